// The sums without noise that a device helped to: sketches are those of a native device, and so is what it refuses.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { Offer, Plan } from "../../../../client/browser/page/aggregation/messages.js";
import { newHistory, onPlan, onSurvivors, separation, sketch } from "../../../../client/browser/page/aggregation/sumhistory.js";
import { ProtocolError } from "../../../../client/browser/page/errors.js";
import { parse } from "../../../../client/browser/page/safetensors.js";
import { raw } from "./vectors.mjs";

const made = JSON.parse(readFileSync(process.env.EDGEADAPT_SUMS, "utf8"));

test("sketches are the native ones, to the bit", async () => {
  for (const { blob, key, sketch: expected } of made.sketches) {
    const found = await sketch(parse(raw(blob)), raw(key));
    assert.deepEqual(new Uint8Array(found.buffer), raw(expected));
    assert.equal(separation(found, found, ["A", "B", "head"]), 0);
  }
});

test(`${made.histories.length} histories of plans and sums have the native verdicts`, async () => {
  for (const { key, share, events } of made.histories) {
    let known = { ...newHistory(), key: raw(key) };
    for (const { body, offer, blob, survivors, revoked, refused } of events) {
      const plan = Plan.decode(raw(body));
      const { spec } = Offer.decode(raw(offer));
      const serials = survivors && new Map(Object.entries(survivors).map(([name, serial]) => [name, BigInt(serial)]));
      let why = null;
      try {
        known = serials ? onSurvivors(known, plan, spec, serials, new Set(revoked.map(BigInt))) : await onPlan(known, plan, spec, raw(blob), share);
      } catch (error) {
        assert.ok(error instanceof ProtocolError, error.stack);
        why = error.about;
      }
      assert.equal(why, refused);
    }
    assert.deepEqual(known, structuredClone(known)); // it is kept in the browser's profile
  }
});

test("a tab draws its own key", () => {
  assert.notDeepEqual(newHistory().key, newHistory().key);
});
