import assert from "node:assert/strict";
import test from "node:test";

import { pack, parse } from "../../../client/browser/page/container.js";
import { restore } from "../../../client/browser/page/quantization.js";
import { AdamW, descend } from "../../../client/browser/page/learning/descent.js";
import { bytes, made } from "./made.mjs";

const { steps, files, orders, nearest } = made.learning;
const { inLessonOrder, inOwnWords, parsePhrases } = await import(new URL("learning/classifier.js", `file://${process.env.EDGEADAPT_SITE}/`));
const floats = (base64) => new Float32Array(bytes(base64).buffer);

test("AdamW takes the steps that the native one takes, with and without weight decay", () => {
  for (const { rate, decay, start, gradients, after } of steps) {
    const optimizer = new AdamW(rate, decay);
    const values = new Map([["w", floats(start)]]);
    gradients.forEach((gradient, i) => {
      optimizer.step(values, new Map([["w", floats(gradient)]]));
      const expected = floats(after[i]);
      values.get("w").forEach((value, at) => {
        // Powers of the betas may differ in the last place.
        assert.ok(Math.abs(value - expected[at]) <= 2e-7 * Math.abs(expected[at]) + 1e-12, `step ${i}: ${value}`);
      });
    });
  }
});

for (const [raw, pairs, about] of files) {
  test(`the file ${JSON.stringify(raw.slice(0, 40))} of phrases is read or refused as natively`, () => {
    const read = () => parsePhrases(bytes(raw), "phrases.tsv").map(({ label, text }) => [label, text]);
    if (about === null) assert.deepEqual(read(), pairs);
    else assert.throws(read, (error) => error.name === "DataError" && error.about === about);
  });
}

test("a lesson has its phrases in the order that the native one has", async () => {
  for (const [lesson, phrases, expected] of orders) {
    const found = await inLessonOrder(phrases.map(([label, text]) => ({ label, text })), lesson);
    assert.deepEqual(found.map(({ label, text }) => [label, text]), expected);
  }
});

test("public phrases in a device's own words come first, as natively", () => {
  const letters = { tokens: (text) => [...text].map((letter) => letter.codePointAt(0)) };
  for (const [own, phrases, expected] of nearest) {
    const found = inOwnWords(letters, phrases.map((text) => ({ text })), [{ text: own }]);
    assert.deepEqual(found.map(({ text }) => text), expected);
  }
});

for (const [form, { file }] of Object.entries(made.adapters)) {
  test(`the tensors of a file of format ${form} are the same after they are written and read`, () => {
    const inputs = restore(parse(bytes(file)), form);
    assert.deepEqual(restore(parse(pack(inputs)), "fp32"), new Map([...inputs].sort(([a], [b]) => (a < b ? -1 : 1))));
  });
}

const PLAIN = { optimizer: "sgd", learning_rate: 1, momentum: 0.9, weight_decay: 0, proximal: 0, gradient_norm: 0, schedule: "constant" };
const descended = (gradient, task = {}, control = {}, loss = 0) => {
  const gradientsOf = async (values, batch) => ({ loss, gradients: new Map([["w", gradient(batch)]]) });
  return descend(new Map([["w", Float32Array.of(1, -2)]]), [[0], [1], [2]], gradientsOf, { ...PLAIN, ...task }, ["w"], control);
};

test("in a round a gradient that is not finite counts as zero; else it is an error", async () => {
  const odd = ([batch]) => Float32Array.of(batch === 1 ? NaN : 0.5, 0.25);
  const zero = ([batch]) => (batch === 1 ? Float32Array.of(0, 0) : Float32Array.of(0.5, 0.25));
  assert.deepEqual(await descended(odd, {}, { unfailing: true }), await descended(zero));
  await assert.rejects(descended(odd), { about: "training.loss" });
  await assert.rejects(descended(zero, {}, {}, NaN), { about: "training.loss" });
});

test("whatever the gradients, a trained value is finite and near its start", async () => {
  for (const optimizer of ["sgd", "adamw"]) {
    for (const value of [NaN, Infinity, 3e38, -3e38]) {
      const found = await descended(() => Float32Array.of(value, -value), { optimizer }, { unfailing: true }, NaN);
      assert.ok(found.get("w").every((each) => Math.abs(each) <= 1002), `${optimizer} ${value}: ${found.get("w")}`);
    }
  }
});

test("the weight decay of SGD is in the gradient that is clipped, and the device's norm clips what the task does not", async () => {
  const still = await descended(() => Float32Array.of(0, 0), { weight_decay: 0.5, gradient_norm: 1e-9 });
  assert.ok(still.get("w").every((each, i) => Math.abs(each - [1, -2][i]) < 1e-6));
  const steep = () => Float32Array.of(3, 4);
  assert.deepEqual(await descended(steep, {}, { norm: 1 }), await descended(steep, { gradient_norm: 1 }));
});
