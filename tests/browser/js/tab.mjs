// A tab without a browser: evaluates expressions over the page's modules. Requests on standard input and answers on standard
// output, a JSON object a line. What it stores is forgotten when another tab is asked for.

import { existsSync, readFileSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const page = pathToFileURL(`${process.argv[2]}/`);
const stores = new Map(); // name → records by key, as IndexedDB copies them
const locks = new Set();

globalThis.indexedDB = { open: () => settled({ objectStoreNames: { contains: () => true }, transaction, close() {} }, "onsuccess") };
globalThis.navigator ??= {};
navigator.locks = {
  async request(name, { ifAvailable }, work) {
    if (locks.has(name)) return ifAvailable ? work(null) : new Promise(() => {});
    locks.add(name);
    return Promise.resolve(work({ name })).finally(() => locks.delete(name));
  },
};

/** Runs the request that a store is asked for; done at the end of the turn, as IndexedDB's are. */
function transaction(name) {
  const records = stores.get(name) ?? stores.set(name, new Map()).get(name);
  const done = (result) => settled(structuredClone(result), "onsuccess");
  const asked = {
    objectStore: () => ({
      get: (key) => done(records.get(key)),
      getAll: () => done([...records.values()]),
      put: (value, key) => (records.set(key, structuredClone(value)), done(key)),
      delete: (key) => (records.delete(key), done(undefined)),
    }),
  };
  setTimeout(() => asked.oncomplete?.());
  return asked;
}

function settled(result, event) {
  const request = { result };
  queueMicrotask(() => request[event]?.());
  return request;
}

globalThis.load = (name) => import(new URL(`${name}.js`, page));
/** An engine of the bundle in a folder, which is read as picked files are, but as it is now. */
globalThis.opened = async (progress) => {
  const [{ Engine }, { FolderSource }] = await Promise.all([load("engine"), load("sources")]);
  const source = new FolderSource([]);
  const get = (path) => {
    const file = join(bundle, path);
    return existsSync(file) ? { size: statSync(file).size, arrayBuffer: async () => new Uint8Array(readFileSync(file)).buffer } : undefined;
  };
  source.files = { get, keys: () => readdirSync(bundle, { recursive: true }) };
  return Engine.open(source, readFileSync(join(bundle, "../trust.pem"), "utf8"), progress);
};

for await (const line of createInterface({ input: process.stdin })) {
  const { expression, fresh } = JSON.parse(line);
  if (fresh) {
    stores.clear();
    locks.clear();
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
