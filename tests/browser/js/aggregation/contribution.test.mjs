// The rotation, bit for bit as an independent script made it; contributions, bit for bit as a native device makes them.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { clip, contribution, encode, momentContribution, momentSegments, pack, requireBounds, updateSegments } from "../../../../client/browser/page/aggregation/contribution.js";
import { momentsOf } from "../../../../client/browser/page/learning/moments.js";
import { Offer } from "../../../../client/browser/page/aggregation/messages.js";
import { peak, rotate, seedOf } from "../../../../client/browser/page/aggregation/rotation.js";
import { DataError } from "../../../../client/browser/page/errors.js";
import { given, hex, raw, read } from "./vectors.mjs";

const made = JSON.parse(readFileSync(process.env.EDGEADAPT_CONTRIBUTIONS, "utf8"));
const doubles = (digits) => new Float64Array(raw(digits).buffer);

/** A double as Python's float.hex writes it. */
function double(text) {
  const [, sign, whole, fraction, exponent] = /^(-?)0x([01])\.?([0-9a-f]*)p([+-]\d+)$/.exec(text);
  return (sign ? -1 : 1) * parseInt(whole + fraction, 16) * 2 ** (exponent - 4 * fraction.length);
}

const { cases, peaks } = read("rotation.json");

for (const { adapter, seed, vector, rotated } of cases) {
  test(`${vector.length} numbers are rotated`, async () => {
    const input = Float64Array.from(vector, double);
    assert.equal(hex(await seedOf(raw(adapter))), seed);
    const found = await rotate(input, raw(seed));
    assert.deepEqual([...found], rotated.map(double));
    assert.deepEqual([...input], vector.map(double));
  });
}

test("the bound on rotated coordinates is the same number", () => {
  for (const [size, bound] of Object.entries(peaks)) assert.equal(peak(Number(size)), double(bound));
});

test("numbers are rounded to ring steps as natively, with the same coins", async () => {
  for (const { vector, values, key, packed } of made.encoded) {
    const given_ = Object.fromEntries(Object.entries(values).map(([name, digits]) => [name, doubles(digits)]));
    assert.equal(hex(pack(await encode(vector, given_, given(key)), vector.ring_bits)), packed);
  }
});

test("a value that is not finite or beyond its bound, and another layout, are refused", async () => {
  const vector = { segments: [{ name: "delta", size: 2, bound: 1, noise: 0 }], ring_bits: 16, max_clients: 8 };
  for (const [value, about] of [[[NaN, 0], "delta"], [[0, Infinity], "delta"], [[1 + 2 ** -52, 0], "delta"], [[-2, 0], "delta"], [[0], "delta"]]) {
    await assert.rejects(encode(vector, { delta: Float64Array.from(value) }), (error) => {
      assert.ok(error instanceof DataError);
      assert.equal(error.about, `vector.${about}`);
      return true;
    });
  }
  await assert.rejects(encode(vector, { other: Float64Array.of(0, 0) }), DataError);
  await assert.rejects(encode(vector, { delta: Float64Array.of(0, 0), other: Float64Array.of(0) }), { about: "vector.segments" });
});

test("a contribution is the native one, with the same randomness", async () => {
  for (const { offer, delta, examples, score, adapter, drawn, packed } of made.contributions) {
    const { spec } = Offer.decode(raw(offer));
    requireBounds(spec, updateSegments(spec, doubles(delta).length));
    const found = await contribution({ delta: doubles(delta), examples, score }, spec, adapter, given(drawn));
    assert.equal(hex(pack(found, spec.vector.ring_bits)), packed);
  }
});

test("moments are contributed as the native ones, with the same randomness", () => moments(made.moments));

async function moments({ offer, embeddings, labels, d, k, score, drawn, packed }) {
  const { spec } = Offer.decode(raw(offer));
  requireBounds(spec, momentSegments(spec, d, k));
  assert.throws(() => requireBounds(spec, momentSegments(spec, d, k + 1)), { about: "offer.spec.vector" });
  const rows = labels.map((_, i) => doubles(embeddings).slice(i * d, (i + 1) * d));
  const found = await momentContribution(momentsOf(rows, labels, d, k), score, spec, given(drawn));
  assert.equal(hex(pack(found, spec.vector.ring_bits)), packed);
}

test("moments of no examples are zero, and an embedding that is not finite is refused", () => {
  const { xx, xy, count } = momentsOf([], [], 3, 2);
  assert.deepEqual([[...xx], [...xy], count], [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], 0]);
  assert.deepEqual([...momentsOf([Float32Array.of(0, 0)], [1], 2, 2).xx], [0, 0, 0]);
  for (const odd of [NaN, Infinity]) {
    assert.throws(() => momentsOf([Float32Array.of(odd, 0)], [0], 2, 2), { name: "DataError", about: "embeddings" });
  }
});

test("an offer whose bounds do not follow from its clip norm, weight cap and layout is refused", () => {
  for (const { offer, size, fair } of made.bounds) {
    const { spec } = Offer.decode(raw(offer));
    const check = () => requireBounds(spec, updateSegments(spec, size));
    if (fair) check();
    else assert.throws(check, { name: "ProtocolError", about: "offer.spec.vector" });
  }
});

test("an update is clipped to its norm", () => {
  assert.deepEqual([...clip(Float64Array.of(3, 4), 10)], [3, 4]);
  const [x, y] = clip(Float64Array.of(3, 4), 1);
  assert.ok(Math.hypot(x, y) <= 1 && Math.hypot(x, y) > 1 - 1e-9 && Math.abs(x / y - 0.75) < 1e-12);
});
