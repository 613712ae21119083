// Reads cases from standard input and writes what became of each: `node main.mjs FOLDER < cases.json`.
//
// FOLDER has trust.pem and bundle/. A case is {"adapter": NAME, "files": {PATH: TEXT | {"hex": HEX} | null}}: the adapter
// is opened in the folder with these files changed. An answer is {"rule": RULE}, or {"rule": null, "tensors": {NAME:
// {"shape": [SIZE], "hex": HEX}}, "seen": TEXT}.

import { existsSync, readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

import { open } from "./bundle.mjs";
import { Refused } from "./refused.mjs";

/** A folder with some files changed. */
class Changed {
  constructor(folder, changes) {
    [this.folder, this.changes] = [folder, new Map(Object.entries(changes))];
  }

  read(path) {
    if (!this.changes.has(path)) return existsSync(join(this.folder, path)) ? readFileSync(join(this.folder, path)) : null;
    const change = this.changes.get(path);
    if (change === null) return null;
    return typeof change === "string" ? Buffer.from(change) : Buffer.from(change.hex, "hex");
  }

  list(path) {
    const within = [...this.changes.keys()].filter((each) => each.startsWith(`${path}/`));
    const names = [...readdirSync(join(this.folder, path)), ...within.map((each) => each.slice(path.length + 1))];
    return names.filter((name) => this.changes.get(`${path}/${name}`) !== null);
  }
}

function answer(folder, { adapter, files }) {
  try {
    const { tensors, seen } = open(new Changed(folder, files), adapter);
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
