// A tab without a browser: evaluates expressions over the page's modules. Requests on standard input and answers on standard
// output, a JSON object a line. What it stores is forgotten when another tab is asked for.

import { existsSync, readFileSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const page = pathToFileURL(`${process.argv[2]}/`);
let store; // of this tab

globalThis.load = (name) => import(new URL(`${name}.js`, page));
/** An engine of the bundle in a folder, which is read as picked files are, but as it is now. */
globalThis.opened = async (progress) => {
  const [{ Engine }, { FolderSource }, { Store }] = await Promise.all([load("engine"), load("sources"), load("storage")]);
  const source = new FolderSource([]);
  const get = (path) => {
    const file = join(bundle, path);
    return existsSync(file) ? { size: statSync(file).size, arrayBuffer: async () => new Uint8Array(readFileSync(file)).buffer } : undefined;
  };
  source.files = { get, keys: () => readdirSync(bundle, { recursive: true }) };
  return Engine.open(source, readFileSync(join(bundle, "../trust.pem"), "utf8"), progress, undefined, (store ??= new Store()));
};

for await (const line of createInterface({ input: process.stdin })) {
  const { expression, fresh } = JSON.parse(line);
  if (fresh) {
    store = undefined;
    globalThis.bundle = fresh;
    globalThis.engine = undefined;
  }
  const answer = {};
  try {
    answer.value = await (0, eval)(expression);
  } catch (error) {
    const { name, message, about, stack } = error;
    answer.error = { name, message, about, stack };
  }
  console.log(JSON.stringify(answer));
}
