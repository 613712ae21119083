import assert from "node:assert/strict";
import test from "node:test";

import { parse } from "../../../client/browser/page/safetensors.js";
import { bytes, made } from "./made.mjs";

const { sound, refused, damaged } = made.safetensors;
const floats = (base64) => [...new Float32Array(bytes(base64).buffer)];

function read(raw) {
  try {
    return parse(bytes(raw));
  } catch (error) {
    assert.equal(error.name, "DataError", error.stack);
    assert.ok(!error.message.includes("\n"));
    return null;
  }
}

const same = (found, tensors) => {
  assert.deepEqual([...found.keys()], Object.keys(tensors));
  for (const [name, { shape, values }] of Object.entries(tensors)) {
    assert.deepEqual(found.get(name).shape, shape);
    assert.deepEqual([...found.get(name).values], floats(values));
  }
};

test("adapter files are read as natively", () => {
  for (const [raw, tensors] of sound) same(parse(bytes(raw)), tensors);
});

for (const [what, raw, about] of refused) {
  test(`${what} is refused`, () => {
    assert.throws(() => parse(bytes(raw)), (error) => error.name === "DataError" && error.about === about);
  });
}

test("what is read of a damaged file is what a native device reads of it", () => {
  let [accepted, natively] = [0, 0];
  for (const [raw, tensors] of damaged) {
    const found = read(raw);
    natively += tensors !== null;
    if (found === null) continue;
    accepted += 1;
    assert.notEqual(tensors, null, "a native device refuses it");
    same(found, tensors);
  }
  assert.ok(accepted > 10 && accepted < damaged.length / 2 && natively < damaged.length / 2, `${accepted}, ${natively}`);
});
