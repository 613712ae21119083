// Damaged messages are answered or refused as by a native device, and about the same field.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { join } from "../../../../client/browser/page/aggregation/device.js";
import { arrayType } from "../../../../client/browser/page/aggregation/contribution.js";
import { ProtocolError } from "../../../../client/browser/page/errors.js";
import { CASES, POLICY, deviceOf, given, hex, raw } from "./vectors.mjs";

const hostile = JSON.parse(readFileSync(process.env.EDGEADAPT_HOSTILE, "utf8"));
const NAME = "unit-0";

/** The steps of a device of the vector, each from the state before it. */
function steps(one, device) {
  return {
    offer: (_, body) => join(device, body, given(one.join[NAME].repeat(40))), // some offer more rounds
    roster: (state, body) => state.onRoster(device, body, given(one.deal[NAME])),
    async assignment(state, body) {
      const planned = await state.onPlan(device, body);
      return planned.contribute(device, arrayType(one.spec.ring_bits).from(one.plain[NAME]));
    },
    survivors: (state, body) => state.onSurvivors(device, body),
    unmask: (state, body) => state.onUnmask(device, body),
  };
}

/** The state before a step, which has not answered. */
async function before(one, device, last) {
  const good = { ...one, assignment: one.assignments[NAME] };
  let state = null;
  for (const [step, take] of Object.entries(steps(one, device))) {
    if (step === last) return state;
    [state] = await take(state, raw(good[step]));
  }
}

// A certificate is read by two libraries: they agree on whether it is sound, not always on what is wrong first.
const kind = (about) => (/^(certificate|key)\b/.test(about) ? "certificate" : about);

for (const [label, messages] of Object.entries(hostile)) {
  test(`${messages.length} damaged messages in the case ${label}`, async () => {
    const one = CASES[label];
    const device = await deviceOf(NAME, { ...one, policy: { ...POLICY, known_bases: [one.spec.digest] } });
    const take = steps(one, device);
    const states = {};
    for (const step of Object.keys(take)) states[step] = await before(one, device, step);
    for (const { step, message, about, answer } of messages) {
      if (about === null) {
        const [, found] = await take[step](await before(one, device, step), raw(message));
        assert.equal(hex(found), answer);
        continue;
      }
      await assert.rejects(take[step](states[step], raw(message)), (error) => {
        assert.ok(error instanceof ProtocolError, error.stack);
        assert.equal(kind(error.about), kind(about), `${step}: ${error.message}: ${message}`);
        return true;
      });
    }
    await take.unmask(states.unmask, raw(one.unmask)); // no refusal changed the state
  });
}
