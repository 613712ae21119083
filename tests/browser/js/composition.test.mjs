import assert from "node:assert/strict";
import test from "node:test";

import { compose, format, parse } from "../../../client/browser/page/composition.js";
import { ConfigError } from "../../../client/browser/page/errors.js";
import { growth } from "./growth.mjs";
import { bytes, made } from "./made.mjs";

const { adapters, composed, written } = made.compositions;
const REFUSED = ["global:0.3", "global+anna", "anna:-1", "anna-headless:-1", "anna:0.5"];
const BASE = { max_rank: 64 };
const read = (tensors) =>
  new Map(
    Object.entries(tensors).map(([name, { shape, values }]) => [
      name,
      { shape, values: new Float32Array(bytes(values).buffer) },
    ]),
  );
const verified = (parts) =>
  parts.map(({ name }) => ({ manifest: adapters[name].manifest, inputs: read(adapters[name].inputs) }));
const about = (error) => error instanceof ConfigError && error.about;

for (const [text, canonical, refused] of written) {
  test(`${JSON.stringify(text)} is read or refused as natively`, () => {
    if (refused === null) assert.equal(format(parse(text)), canonical);
    else assert.throws(() => parse(text), (error) => about(error) === refused);
  });
}

for (const [text, refused, rank, temperature, tensors] of composed) {
  test(`${text} is, bit for bit, what a native device composes, or refused as there`, () => {
    const parts = parse(text);
    const composing = () => compose(parts, verified(parts), BASE);
    if (refused) return assert.throws(composing, (error) => about(error) === refused);
    const found = composing();
    assert.deepEqual([found.name, found.rank, found.temperature], [format(parts), rank, temperature]);
    assert.deepEqual(found.inputs, read(tensors));
  });
}

test("most compositions are computed, some are refused", () => {
  const refused = composed.filter(([, about]) => about).map(([text]) => text);
  assert.deepEqual(refused, REFUSED);
});

test("adapters with other labels, and too high a rank, are refused", () => {
  const parts = parse("anna:0.5+global:0.5");
  const [anna, global] = verified(parts);
  const other = { ...global, manifest: { ...global.manifest, labels: global.manifest.labels.toReversed() } };
  assert.throws(() => compose(parts, [anna, other], BASE), (error) => about(error) === "composition.labels");
  assert.throws(() => compose(parts, [anna, global], { max_rank: 7 }), (error) => about(error) === "composition.rank");
  assert.equal(compose(parts, [anna, global], { max_rank: 8 }).rank, 8);
});

test("a weight of many digits that is none is refused in linear time", () => {
  const read = (digits) => assert.throws(() => parse(`global:${digits}x`), (error) => error instanceof ConfigError);
  assert.ok(growth(read, (size) => "1".repeat(size), 2 ** 16) < 3);
});
