import assert from "node:assert/strict";
import test from "node:test";

import { pack, parse } from "../../../client/browser/page/container.js";
import { restore } from "../../../client/browser/page/quantization.js";
import { AdamW } from "../../../client/browser/page/learning/descent.js";
import { bytes, made } from "./made.mjs";

const { steps, files, orders } = made.learning;
const { parsePhrases } = await import(new URL("learning/phrases.js", `file://${process.env.EDGEADAPT_SITE}/`));
const { inLessonOrder } = await import(new URL("learning/classifier.js", `file://${process.env.EDGEADAPT_SITE}/`));
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

for (const [form, { file }] of Object.entries(made.adapters)) {
  test(`the tensors of a file of format ${form} are the same after they are written and read`, () => {
    const inputs = restore(parse(bytes(file)), form);
    assert.deepEqual(restore(parse(pack(inputs)), "fp32"), new Map([...inputs].sort(([a], [b]) => (a < b ? -1 : 1))));
  });
}
