// Noise, its account and the owner's limit on it: as a native device, from the same bits the same numbers.

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import test from "node:test";

import { epsilonOf } from "../../../../client/browser/page/aggregation/accounting.js";
import { momentSegments, noisyContribution, pack, requireBounds, updateSegments } from "../../../../client/browser/page/aggregation/contribution.js";
import { derivedEntropy } from "../../../../client/browser/page/aggregation/masks.js";
import { Offer } from "../../../../client/browser/page/aggregation/messages.js";
import { Table, draw, table } from "../../../../client/browser/page/aggregation/noise.js";
import { Policy } from "../../../../client/browser/page/aggregation/policy.js";
import * as privacyledger from "../../../../client/browser/page/aggregation/privacyledger.js";
import { spentIn, stepOf } from "../../../../client/browser/page/aggregation/spec.js";
import { sha256 } from "../../../../client/browser/page/bytes.js";
import { ProtocolError } from "../../../../client/browser/page/errors.js";
import { corrections } from "../../../../client/browser/page/learning/moments.js";
import { given, hex, raw } from "./vectors.mjs";

const made = JSON.parse(readFileSync(process.env.EDGEADAPT_NOISE, "utf8"));
const doubles = (digits) => new Float64Array(raw(digits).buffer);
/** `expected` is null where it is infinite. */
function near(found, expected) {
  if (expected === null) assert.equal(found, Infinity);
  else assert.ok(Math.abs(found - expected) <= 1e-9 * expected, `${found} ${expected}`);
}

const keyOf = (digits) => crypto.subtle.importKey("raw", raw(digits), "AES-CTR", false, ["encrypt"]);

for (const { mechanism, variance, key, size, drawn, first, bounds } of made.draws) {
  test(`${mechanism} noise of variance ${variance} is the native one, from the same key`, async () => {
    const found = table(mechanism, variance);
    assert.equal(found.first, first);
    assert.equal(await sha256(new Uint8Array(found.low.buffer)), bounds);
    const noise = await draw(mechanism, variance, size, derivedEntropy(await keyOf(key)));
    assert.equal(await sha256(new Uint8Array(noise.buffer)), drawn);
  });
}

test("a draw that begins as a boundary is decided by its next bits, as natively", async () => {
  const { weights, words, drawn } = made.ties;
  const entropy = given(words);
  const found = await new Table(weights.map(BigInt)).draw(entropy, drawn.length);
  assert.deepEqual([...found], drawn);
  assert.equal(entropy.left(), 0);
});

test("a variance that no table has is refused", () => {
  for (const odd of [0, -1, NaN, Infinity, 2 ** 20 + 1]) assert.throws(() => table("skellam", odd), { about: "noise.variance" });
});

test("a contribution with noise is the native one, with the same randomness", async () => {
  for (const { offer, vector, adapter, drawn, packed } of made.contributions) {
    const { spec } = Offer.decode(raw(offer));
    requireBounds(spec, updateSegments(spec, doubles(vector).length));
    assert.throws(() => requireBounds(spec, updateSegments(spec, doubles(vector).length + 1)), { about: "offer.spec.vector" });
    const entropy = given(drawn);
    assert.equal(hex(pack(await noisyContribution(doubles(vector), spec, adapter, entropy), spec.vector.ring_bits)), packed);
    assert.equal(entropy.left(), 0);
  }
});

test("what is not finite, or beyond its clip norm after it was clipped, is not contributed", async () => {
  const { spec } = Offer.decode(raw(made.contributions[0].offer));
  const odd = new Float64Array(spec.vector.segments[0].size).fill(NaN);
  await assert.rejects(noisyContribution(odd, spec, made.contributions[0].adapter), { name: "DataError", about: "norm" });
});

test("corrections are the native ones", () => {
  const { offer, embeddings, labels, d, k, vector, ...given } = made.corrections;
  const { spec } = Offer.decode(raw(offer));
  requireBounds(spec, momentSegments(spec, d, k));
  assert.throws(() => requireBounds(spec, momentSegments(spec, d, k - 1)), { about: "offer.spec.vector" });
  const head = { weight: doubles(given["classifier.weight"]), bias: doubles(given["classifier.bias"]) };
  const rows = labels.map((_, i) => doubles(embeddings).slice(i * d, (i + 1) * d));
  const found = corrections(rows, labels, head);
  const expected = doubles(vector);
  assert.equal(found.length, expected.length);
  found.forEach((x, i) => assert.ok(Math.abs(x - expected[i]) < 1e-12));
  assert.ok(corrections([], [], head).every((x) => x === 0));
  assert.throws(() => corrections(rows, labels, { ...head, weight: head.weight.with(0, NaN) }), { about: "classifier.weight" });
});

test("noise that a page draws for itself", async () => {
  const { spec } = Offer.decode(raw(made.own.offer));
  const found = await noisyContribution(new Float64Array(spec.vector.segments[0].size), spec, made.own.adapter);
  writeFileSync(process.env.EDGEADAPT_OWN, pack(found, spec.vector.ring_bits));
});

test(`${made.specs.length} offers are refused, or accounted for, as natively`, () => {
  for (const { offer, about, step, epsilon, corrupt } of made.specs) {
    let found = null;
    try {
      found = Offer.decode(raw(offer)).spec;
    } catch (error) {
      assert.ok(error instanceof ProtocolError, error.stack);
      assert.equal(error.about, about);
      continue;
    }
    assert.equal(about, null);
    assert.equal(stepOf(found.vector, found.vector.segments[0]), step);
    const { delta } = found.privacy;
    near(epsilonOf(spentIn(found, found.minimum_survivors, corrupt), delta), epsilon);
  }
});

test(`${made.policies.length} policies judge an offer as natively`, () => {
  for (const { offer, policy, cohort, about } of made.policies) {
    const { spec } = Offer.decode(raw(offer));
    const check = () => new Policy(policy).check(spec, cohort);
    if (about === null) check();
    else assert.throws(check, { name: "ProtocolError", about });
  }
});

test(`${made.ledgers.length} ledgers have the native verdicts`, () => {
  for (const { policy: limits, events } of made.ledgers) {
    const policy = new Policy(limits);
    let known = privacyledger.EMPTY;
    for (const { offer, cohort, survivors, refused, epsilon, noisy, bare } of events) {
      const { spec } = Offer.decode(raw(offer));
      let why = null;
      try {
        known = survivors ? privacyledger.onSurvivors(known, spec, cohort, survivors, policy) : privacyledger.onPlan(known, spec, cohort, policy);
      } catch (error) {
        assert.ok(error instanceof ProtocolError, error.stack);
        why = error.about;
      }
      assert.equal(why, refused);
      const found = privacyledger.requireLedger(structuredClone(known));
      assert.deepEqual([found.noisy, found.bare], [noisy, bare]);
      near(epsilonOf(privacyledger.spent(found), policy.delta), epsilon);
    }
  }
});

test("a copy of the account, as of a copied profile, spends the limit anew, and no time of a clock is in it", () => {
  const cohort = 8;
  const spec = made.ledgers[0].events.map(({ offer }) => Offer.decode(raw(offer)).spec).find(({ privacy }) => privacy);
  const once = new Policy({ known_bases: [spec.base_digest] });
  const cost = epsilonOf(privacyledger.spent(privacyledger.onPlan(privacyledger.EMPTY, spec, cohort, once)), once.delta);
  const limited = { corrupt_fraction: once.corrupt_fraction, maximum_epsilon: 1.01 * cost, delta: once.delta };
  const accounts = [privacyledger.EMPTY, structuredClone(privacyledger.EMPTY)];
  const after = accounts.map((known) => privacyledger.onPlan(known, spec, cohort, limited));
  assert.deepEqual(after[0], after[1]);
  for (const known of after) assert.throws(() => privacyledger.onPlan(known, spec, cohort, limited), { about: "plan.epsilon" });
});

test("a damaged ledger is refused", () => {
  const { EMPTY } = privacyledger;
  const short = { curve: [0], draws: 0 };
  for (const odd of [null, {}, { ...EMPTY, settled: short }, { ...EMPTY, pending: { ...EMPTY.pending, draws: -1 } }, { ...EMPTY, noisy: 0.5 }]) {
    assert.throws(() => privacyledger.requireLedger(odd), { name: "TrustError", about: "privacy" });
  }
  const negative = { curve: EMPTY.settled.curve.with(3, -1), draws: 0 };
  assert.throws(() => privacyledger.requireLedger({ ...EMPTY, settled: negative }), { about: "privacy" });
});
