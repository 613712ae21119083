import assert from "node:assert/strict";
import test from "node:test";

import { DataError } from "../../../client/browser/page/errors.js";
import { sample, seeded } from "../../../client/browser/page/sampling.js";

const scores = Float32Array.from([1, 3, 2, 3, -1]);
const greedy = { temperature: 0, topP: 1, random: () => 0 };

test("without a temperature the first of the highest scores is taken", () => {
  assert.equal(sample(scores, greedy), 1);
});

test("a score that is not finite is refused", () => {
  for (const bad of [NaN, Infinity, -Infinity]) {
    assert.throws(() => sample(Float32Array.of(0, bad), greedy), DataError);
  }
});

test("tokens are drawn as often as their probability says, and not with another temperature's", () => {
  const drawn = (temperature, topP) => {
    const [counts, random] = [new Float64Array(5), seeded(3)];
    for (let i = 0; i < 20000; i++) counts[sample(scores, { temperature, topP, random })] += 1 / 20000;
    return counts;
  };
  const softmax = (temperature) => {
    const powers = scores.map((score) => Math.exp(score / temperature));
    return powers.map((power) => power / powers.reduce((a, b) => a + b));
  };
  const far = (one, other) => Math.max(...one.map((value, i) => Math.abs(value - other[i])));
  assert.ok(far(softmax(1), drawn(1, 1)) < 0.015);
  assert.ok(far(softmax(1), drawn(0.7, 1)) > 0.03);
  assert.ok(far(softmax(0.7), drawn(0.7, 1)) < 0.015);
  assert.deepEqual([...drawn(1, 0.5)].map(Boolean), [false, true, false, true, false], "the two likeliest hold half");
});

test("numbers of a seed are its own, and lie in [0, 1)", () => {
  const first = Array.from({ length: 1000 }, seeded(1));
  assert.deepEqual(first, Array.from({ length: 1000 }, seeded(1)));
  assert.notDeepEqual(first, Array.from({ length: 1000 }, seeded(2)));
  assert.ok(first.every((x) => x >= 0 && x < 1));
  assert.ok(Math.abs(first.reduce((a, b) => a + b) / 1000 - 0.5) < 0.03);
});
