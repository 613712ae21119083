import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import test from "node:test";

// The page's own modules, or the built package.
const { EdgeAdaptError, Store, verify } = await import(process.env.EDGEADAPT_KIT ?? new URL(`file://${process.env.EDGEADAPT_SITE}/device.js`));
const VECTORS = new URL("../../vectors/bundle/", import.meta.url);
const TRUST = new URL("trust.pem", VECTORS);
const read = (name) => JSON.parse(readFileSync(new URL(name, VECTORS), "utf8"));
const bytes = (content) => (typeof content === "string" ? Buffer.from(content) : Buffer.from(content.hex, "hex"));
const SEEN = ["seen", "version", "content"]; // rules of another store than a file: trust.js
const NATIVE = [
  // The page gets the keys and the names of files from elsewhere, and runs web.onnx.
  "pinned keys inside the bundle alone", "no pinned keys", "an unlisted file", "no model.onnx is listed",
  // JSON.parse returns the same number for 7.
  "a version with a fraction", "a version with an exponent",
];

/** The vectors with some files changed, as a source of the page. */
function source(changes) {
  return {
    async read(path) {
      const full = `bundle/${path}`;
      const url = new URL(full, VECTORS);
      const content = full in changes ? changes[full] : existsSync(url) ? { hex: readFileSync(url).toString("hex") } : null;
      if (content === null) throw new EdgeAdaptError(`${path} is missing`, path);
      return new Uint8Array(bytes(content));
    },
    size: async () => null,
    adapterNames: async () => ["fp16", "fp32", "int4", "int8"],
  };
}

async function open({ adapter, files }) {
  const pem = new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes(files["trust.pem"] ?? readFileSync(TRUST, "utf8")));
  const { adapters } = await verify({ source: source(files), keys: pem, store: new Store(), adapters: [adapter] });
  return adapters[adapter];
}

for (const { name, rule, ...changed } of read("cases.json")) {
  if (SEEN.includes(rule) || NATIVE.includes(name)) continue;
  test(`the page ${rule ? "refuses" : "accepts"} ${name}`, async () => {
    if (rule) await assert.rejects(open(changed), EdgeAdaptError);
    else await open(changed);
  });
}

for (const [adapter, { tensors }] of Object.entries(read("expected.json").adapters)) {
  test(`the page reads the expected tensors in ${adapter}`, async () => {
    const { inputs } = await open({ adapter, files: {} });
    assert.deepEqual([...inputs.keys()].sort(), Object.keys(tensors).sort());
    for (const [name, { shape, hex }] of Object.entries(tensors)) {
      assert.deepEqual(inputs.get(name).shape, shape);
      assert.equal(Buffer.from(inputs.get(name).values.buffer).toString("hex"), hex);
    }
  });
}
