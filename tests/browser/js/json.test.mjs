import assert from "node:assert/strict";
import test from "node:test";

import { parse } from "../../../client/browser/page/dsse.js";
import { bytes, made } from "./made.mjs";

/** The value, or undefined if the text is refused. */
const read = (raw) => {
  try {
    return { value: parse(raw) };
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof TypeError) return undefined;
    throw error;
  }
};

test("a JSON text is read exactly if a native device reads it", () => {
  assert.ok(made.texts.some(([, accepted]) => accepted));
  assert.ok(made.texts.some(([, accepted]) => !accepted));
  for (const [text, accepted] of made.texts) assert.equal(read(bytes(text)) !== undefined, accepted, text);
});

test("what is read is what the text says", () => {
  for (const [text, accepted] of made.texts) {
    if (accepted) assert.deepEqual(read(bytes(text)).value, JSON.parse(Buffer.from(text, "base64").toString()));
  }
});

test("a key twice is refused, wherever it is and however it is written", () => {
  const refused = (text) => assert.equal(read(new TextEncoder().encode(text)), undefined, text);
  for (const text of ['{"a":1,"a":1}', '[{"b":{"a":1,"\\u0061":2}}]', '{"__proto__":1,"__proto__":2}']) refused(text);
  for (const text of ['{"a":":"}', '["\\":", {"a\\"" : "x:"}]']) assert.ok(read(new TextEncoder().encode(text)), text);
});

test("a text of a megabyte is neither a crash nor slow", () => {
  for (const text of ["[".repeat(1e6), `"${"a\\n".repeat(3e5)}"`, `{"a":"${'\\"'.repeat(5e5)}"}`]) {
    read(new TextEncoder().encode(text));
  }
});
