// Revocation lists, and what a device remembers of the adapter that it trained from last: as a native device.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import * as adapterstate from "../../../../client/browser/page/aggregation/adapterstate.js";
import { Root, newerThan, readRevocations, requireFresh } from "../../../../client/browser/page/aggregation/certificates.js";
import { Offer, Plan } from "../../../../client/browser/page/aggregation/messages.js";
import { ProtocolError, TrustError } from "../../../../client/browser/page/errors.js";
import { raw } from "./vectors.mjs";

const made = JSON.parse(readFileSync(process.env.EDGEADAPT_HISTORY, "utf8"));

async function about(promise, Refusal) {
  try {
    return [await promise, null];
  } catch (error) {
    assert.ok(error instanceof Refusal, error.stack);
    return [null, error.about];
  }
}

test(`${made.lists.length} revocation lists are read or refused as natively`, async () => {
  const root = await Root.open(raw(made.root));
  for (const { list, refused, number, serials, ends } of made.lists) {
    const [found, why] = await about(readRevocations(root, raw(list)), TrustError);
    assert.equal(why === null, refused === null, `${why} ${refused} ${list}`);
    if (refused !== null) {
      // Damaged bytes are refused by two libraries, which do not always agree on what is wrong first.
      if (made.exact.includes(list)) assert.equal(why, refused);
      continue;
    }
    assert.equal(found.number, BigInt(number));
    assert.deepEqual([...found.serials].sort(), serials.map(BigInt).sort());
    assert.equal(found.nextUpdate, ends);
  }
});

test("a revoked certificate is refused, and no older list replaces a newer one", async () => {
  const root = await Root.open(raw(made.root));
  const [older, newer] = await Promise.all(made.two.map((list) => readRevocations(root, raw(list))));
  await root.withRevocations(older).verify(raw(made.certificate));
  await assert.rejects(root.withRevocations(newer).verify(raw(made.certificate)), { about: "certificate.revoked" });
  assert.equal(newerThan(newer, older), newer);
  assert.equal(newerThan(older, null), older);
  assert.equal(newerThan(older, older), older);
  assert.throws(() => newerThan(older, newer), { name: "TrustError", about: "revocations.number" });
});

test("a device relies on a list as natively", () => {
  for (const { updates, days, at, refused } of made.fresh) {
    const list = updates && { number: 1n, thisUpdate: updates[0], nextUpdate: updates[1] };
    if (refused === null) requireFresh(list, days, at);
    else assert.throws(() => requireFresh(list, days, at), { name: "ProtocolError", about: refused });
  }
});

test(`${made.histories.length} histories of plans and sums have the native verdicts`, () => {
  for (const { repeats, events } of made.histories) {
    let known = null;
    for (const { body, offer, survivors, revoked, refused } of events) {
      const plan = Plan.decode(raw(body));
      const { spec } = Offer.decode(raw(offer));
      const serials = survivors && new Map(Object.entries(survivors).map(([name, serial]) => [name, BigInt(serial)]));
      let why = null;
      try {
        known = serials ? adapterstate.onSurvivors(known, plan, spec, serials, new Set(revoked.map(BigInt))) : adapterstate.onPlan(known, plan, spec, repeats);
      } catch (error) {
        assert.ok(error instanceof ProtocolError, error.stack);
        why = error.about;
      }
      assert.equal(why, refused);
    }
  }
});
