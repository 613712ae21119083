import assert from "node:assert/strict";
import test from "node:test";

import { pack, parse } from "../../../client/browser/page/container.js";
import { DataError } from "../../../client/browser/page/errors.js";
import { checkSlots, layoutDigest } from "../../../client/browser/page/graphinputs.js";
import { restore } from "../../../client/browser/page/quantization.js";
import { seeded } from "../../../client/browser/page/sampling.js";
import { bytes, made } from "./made.mjs";

for (const [format, { file, tensors, layout }] of Object.entries(made.adapters)) {
  test(`every number of a file of format ${format} is, bit for bit, what a native device reads`, async () => {
    const inputs = restore(parse(bytes(file)), format);
    assert.deepEqual([...inputs.keys()].sort(), Object.keys(tensors).sort());
    for (const [name, { shape, values }] of Object.entries(tensors)) {
      assert.deepEqual(inputs.get(name).shape, shape);
      assert.deepEqual(inputs.get(name).values, new Float32Array(bytes(values).buffer), name);
    }
    assert.equal(await layoutDigest(inputs), layout);
  });

  test(`a damaged file of format ${format} is read or refused with a DataError, nothing else`, () => {
    const sound = bytes(file);
    const random = seeded(11);
    let refused = 0;
    for (let i = 0; i < 4000; i++) {
      const damaged = sound.slice(0, random() < 0.2 ? Math.floor(random() * sound.length) : sound.length);
      for (let n = 1 + Math.floor(3 * random()); n > 0; n--) {
        damaged[Math.floor(random() * Math.min(damaged.length, 400))] = Math.floor(256 * random());
      }
      try {
        restore(parse(damaged), format);
      } catch (error) {
        assert.ok(error instanceof DataError, String(error.stack));
        refused += 1;
      }
    }
    assert.ok(refused > 1000);
  });
}

test("an offset at every place of a file may be anything", () => {
  const sound = bytes(made.adapters.int8.file);
  for (let at = 0; at + 4 <= sound.length; at += 4) {
    for (const offset of [0, 1, sound.length, 0x7fffffff, 0xffffffff]) {
      const damaged = sound.slice();
      new DataView(damaged.buffer).setUint32(at, offset, true);
      try {
        restore(parse(damaged), "int8");
      } catch (error) {
        assert.ok(error instanceof DataError, String(error.stack));
      }
    }
  }
});

test("tensors that share their bytes are refused", () => {
  const file = pack(new Map([["a", { shape: [1000], values: new Float32Array(1000) }], ["b", { shape: [1], values: new Float32Array(1) }]]));
  assert.deepEqual([...parse(file).keys()], ["a", "b"]);
  const view = new DataView(file.buffer);
  const follow = (at) => at + view.getUint32(at, true);
  const places = follow(follow(0) + 16);
  const [a, b] = [follow(places + 4), follow(places + 8)];
  for (const field of [8, 16]) view.setUint32(b + field, follow(a + field) - (b + field), true); // shape and bytes; it wraps
  assert.throws(() => parse(file), DataError);
});

test("a file that begins otherwise, is empty, or is cut is refused", () => {
  const sound = bytes(made.adapters.int8.file);
  for (const file of [new Uint8Array(0), sound.slice(0, 7), sound.slice(0, 40), new Uint8Array(1000)]) {
    assert.throws(() => parse(file), DataError);
  }
});

test("a view into a larger buffer is read as the file alone", () => {
  const sound = bytes(made.adapters.fp16.file);
  const larger = new Uint8Array(sound.length + 24).fill(255);
  larger.set(sound, 5);
  const [own, view] = [parse(sound), parse(larger.subarray(5, 5 + sound.length))];
  for (const [name, tensor] of own) assert.deepEqual(view.get(name), tensor);
});

test("a vector is there once or not", () => {
  const slots = { "key.output_scale": ["given_0", "3"] };
  const fill = (rows) => checkSlots(new Map([["key.output_scale", { shape: [rows, 3] }]]), slots);
  assert.equal(fill(0).get("given_0"), 0);
  assert.equal(fill(1).get("given_0"), 1);
  assert.throws(() => fill(2), /takes \[given_0, 3\]/);
});

test("slots are filled exactly, and a free dimension is one size everywhere", () => {
  const tensor = (...shape) => ({ shape });
  const slots = { a: ["2", "rank_0"], b: ["rank_0", "3"] };
  const fill = (a, b) => checkSlots(new Map([["a", tensor(...a)], ["b", tensor(...b)]]), slots);
  assert.equal(fill([2, 4], [4, 3]).get("rank_0"), 4);
  for (const [a, b] of [[[2, 4], [5, 3]], [[3, 4], [4, 3]], [[2], [4, 3]], [[2, 4, 1], [4, 3]]]) {
    assert.throws(() => fill(a, b), DataError);
  }
  assert.throws(() => checkSlots(new Map([["a", tensor(2, 4)]]), slots), /'b' is missing/);
  assert.throws(() => checkSlots(new Map([["toString", tensor(1)]]), {}), /'toString' is missing/);
});
