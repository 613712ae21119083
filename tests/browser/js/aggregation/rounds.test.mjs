// Complete rounds, byte for byte as an independent script made them; invalid messages are refused as by a native device.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { checkIn, join } from "../../../../client/browser/page/aggregation/device.js";
import { derivable, derive, exchangeKey, pairKey, publicKey, selfKey, sharedSecret } from "../../../../client/browser/page/aggregation/masks.js";
import { CheckIn, unverifiedBody } from "../../../../client/browser/page/aggregation/messages.js";
import { arrayType } from "../../../../client/browser/page/aggregation/contribution.js";
import { ProtocolError } from "../../../../client/browser/page/errors.js";
import { CASES, POLICY, deviceOf, given, hex, raw } from "./vectors.mjs";

// Of a native device: case → what each refusal is about, and → the shares that follow from the share key and the roster.
const { about: ABOUT, dealt: DEALT } = JSON.parse(readFileSync(process.env.EDGEADAPT_NATIVE, "utf8"));
const STEPS = ["challenge", "offer", "roster", "assignment", "survivors", "unmask"]; // that a device answers

async function deliver({ refused }, label, step, name, call, body, seen) {
  for (const [i, bad] of refused.entries()) {
    if (bad.step !== step || bad.device !== name) continue;
    await assert.rejects(call(raw(bad.message)), (error) => {
      assert.ok(error instanceof ProtocolError, error.stack);
      assert.equal(error.about, ABOUT[label][i], bad.why);
      return true;
    });
    seen.push(i);
  }
  return call(raw(body));
}

for (const [label, one] of Object.entries(CASES)) {
  test(`a round of the case ${label}`, async () => {
    const seen = [];
    const bits = one.spec.ring_bits;
    for (const [i, name] of Object.keys(one.certificates).entries()) {
      const device = await deviceOf(name, { ...one, policy: { ...POLICY, known_bases: [one.spec.digest] } });
      const each = (step, call, body) => deliver(one, label, step, name, call, body, seen);

      const last = CheckIn.decode(unverifiedBody(raw(one.check_ins[name]))).last_offer;
      const answer = await each("challenge", (body) => checkIn(device, body, BigInt(i + 1), last), one.challenges[name]);
      assert.equal(hex(answer), one.check_ins[name]);

      const joining = given(one.join[name]);
      const [advertised, advert] = await each("offer", (body) => join(device, body, joining), one.offer);
      assert.equal(hex(advert), one.adverts[name]);
      assert.equal(joining.left(), 0);

      const dealing = given(one.deal[name]);
      const [ready, shares] = await each("roster", (body) => advertised.onRoster(device, body, dealing), one.roster);
      assert.equal(hex(shares), one.shares[name]);
      assert.equal(dealing.left(), 0);
      assert.equal(hex(ready.session.context), one.context);
      assert.deepEqual(ready.session.neighbors(name, ready.session.peers.keys()), one.neighbors[name]);

      const planned = await each("assignment", (body) => ready.onPlan(device, body), one.assignments[name]);
      const [masked, input] = await planned.contribute(device, arrayType(bits).from(one.plain[name]));
      assert.equal(hex(input), one.masked[name]);
      if (!(name in one.consistency_signatures)) continue; // it dropped out, or is silent

      const [confirmed, signed] = await each("survivors", (body) => masked.onSurvivors(device, body), one.survivors);
      assert.equal(hex(signed), one.consistency_signatures[name]);
      const [after, response] = await each("unmask", (body) => confirmed.onUnmask(device, body), one.unmask);
      assert.equal(hex(response), one.unmask_responses[name]);
      assert.equal(after, confirmed.ready);

      for (const again of [
        () => advertised.onRoster(device, raw(one.roster)),
        () => ready.onPlan(device, raw(one.assignments[name])),
        () => planned.contribute(device, arrayType(bits).from(one.plain[name])),
        () => masked.onSurvivors(device, raw(one.survivors)),
        () => confirmed.onUnmask(device, raw(one.unmask)),
      ]) {
        await assert.rejects(again, { name: "ProtocolError", about: "single-use" });
      }
      await assert.rejects(after.onPlan(device, raw(one.assignments[name])), { about: "plan.round" });
      await assert.rejects(masked.onUnmask(device, raw(one.unmask)), { about: "session.adversary" });
    }
    const meant = one.refused.flatMap(({ step }, i) => (STEPS.includes(step) ? [i] : []));
    assert.deepEqual(seen.sort((a, b) => a - b), meant);
  });
}

test("without given randomness, the shares follow from the share key and the roster", async () => {
  for (const [label, shares] of Object.entries(DEALT)) {
    const one = CASES[label];
    const device = await deviceOf("unit-0", { ...one, policy: { ...POLICY, known_bases: [one.spec.digest] } });
    const [advertised] = await join(device, raw(one.offer), given(one.join["unit-0"]));
    assert.equal(hex((await advertised.onRoster(device, raw(one.roster)))[1]), shares);
  }
});

test("no key can be exported", async () => {
  const bytes = crypto.getRandomValues(new Uint8Array(32));
  const [own, seed, bound] = [await exchangeKey(bytes), await derivable(bytes), new Uint8Array(32)];
  const pair = await pairKey(own, await publicKey(own), bound, bound, ["a", "b"]);
  const secret = await sharedSecret(own, await publicKey(own));
  for (const key of [own, seed, pair, secret, await selfKey(seed, bound, bound, "a"), await derive(seed, "AES-GCM", bound)]) {
    assert.equal(key.extractable, false);
  }
});

test("of two requests at the same time, one is answered", async () => {
  const one = CASES.narrow;
  const name = "unit-0";
  const device = await deviceOf(name, { ...one, policy: { ...POLICY, known_bases: [one.spec.digest] } });
  const [advertised] = await join(device, raw(one.offer), given(one.join[name]));
  const both = await Promise.allSettled([1, 2].map(() => advertised.onRoster(device, raw(one.roster), given(one.deal[name]))));
  assert.deepEqual(both.map(({ status }) => status).sort(), ["fulfilled", "rejected"]);
  const [{ value }] = both.filter(({ status }) => status === "fulfilled");
  const plans = await Promise.allSettled([1, 2].map(() => value[0].onPlan(device, raw(one.assignments[name]))));
  assert.deepEqual(plans.map(({ status }) => status).sort(), ["fulfilled", "rejected"]);
});

test("no state shows a secret to what prints, copies or serializes it", async () => {
  const one = CASES.narrow;
  const name = "unit-0";
  const device = await deviceOf(name, { ...one, policy: { ...POLICY, known_bases: [one.spec.digest] } });
  const [advertised] = await join(device, raw(one.offer), given(one.join[name]));
  assert.deepEqual(Object.keys(advertised), ["me", "spec", "offer", "cohort", "ends", "advert"]);
  const [ready] = await advertised.onRoster(device, raw(one.roster), given(one.deal[name]));
  assert.deepEqual(Object.keys(ready).sort(), ["dealers", "ends", "lastRound", "me", "serials", "session"]);
  const planned = await ready.onPlan(device, raw(one.assignments[name]));
  assert.deepEqual(Object.keys(planned), ["ready", "plan"]);
});
