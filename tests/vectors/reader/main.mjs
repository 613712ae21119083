// Reads cases from standard input and writes what became of each: `node main.mjs FOLDER < cases.json`.
//
// A case is {"adapter": NAME, "files": CHANGES}: the adapter is opened in FOLDER with these files changed (folder.mjs). An
// answer is {"rule": RULE}, or {"rule": null, "tensors": {NAME: {"shape": [SIZE], "hex": HEX}}, "seen": TEXT}.

import { readFileSync } from "node:fs";

import { open } from "./bundle.mjs";
import { Folder } from "./folder.mjs";
import { Refused } from "./refused.mjs";

function answer(folder, { adapter, files }) {
  try {
    const { tensors, seen } = open(new Folder(folder, files), adapter);
    const hex = (values) => Buffer.from(values.buffer, values.byteOffset, values.byteLength).toString("hex");
    const found = [...tensors].map(([name, { shape, values }]) => [name, { shape, hex: hex(values) }]);
    return { rule: null, tensors: Object.fromEntries(found), seen };
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return { rule: error.rule };
  }
}

const cases = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(cases.map((each) => answer(process.argv[2], each))));
