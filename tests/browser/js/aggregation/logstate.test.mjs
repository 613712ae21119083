// Proofs about the coordinator's log are accepted or refused as by a native device, and lead to the same state.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { LogState } from "../../../../client/browser/page/aggregation/logstate.js";
import { ProtocolError } from "../../../../client/browser/page/errors.js";
import { hex, raw } from "./vectors.mjs";

const { states, calls } = JSON.parse(readFileSync(process.env.EDGEADAPT_PROOFS, "utf8"));
const bytes = (digits) => digits && raw(digits);

function stateOf(given) {
  const { device, version, adapter, size } = given;
  const [offer, previous, root] = [given.offer, given.previous, given.root].map(bytes);
  const [plan, unconfirmed, survivors] = [given.plan, given.unconfirmed, given.survivors].map(bytes);
  const delivered = given.delivered.map(bytes);
  const numbers = { version: BigInt(version), size: BigInt(size) };
  return new LogState({ device, offer, previous, adapter, root, plan, unconfirmed, survivors, delivered, ...numbers });
}

function written(state) {
  const digits = (value) => (value === null ? null : hex(value));
  return {
    device: state.device,
    offer: hex(state.offer),
    previous: hex(state.previous),
    version: String(state.version),
    adapter: state.adapter,
    size: String(state.size),
    // The native state has the root of no entries before the first proof.
    root: state.size ? hex(state.root) : states[0].root,
    plan: digits(state.plan),
    unconfirmed: digits(state.unconfirmed),
    delivered: state.delivered.map(hex),
    survivors: digits(state.survivors),
  };
}

const CALLS = {
  initial: (_, key, proof, offer, device) => LogState.initial(raw(key), raw(proof), raw(offer), device),
  on_receipt: (state, key, receipt) => state.onReceipt(raw(key), raw(receipt)),
  on_session_chain_proof: (state, key, proof, offer, other) => state.onSessionChainProof(raw(key), raw(proof), raw(offer), other === "True"),
  contributed: (state, plan, message) => state.contributed(raw(plan), raw(message)),
  on_survivors: (state, survivors, answer = null) => state.onSurvivors(survivors, answer === null ? null : raw(answer)),
};

test(`${calls.length} proofs and steps`, async () => {
  for (const { method, state, given, after, about } of calls) {
    const call = CALLS[method](state === null ? null : stateOf(states[state]), ...given);
    if (about === null) {
      assert.deepEqual(written(await call), states[after]);
      continue;
    }
    await assert.rejects(call, (error) => {
      assert.ok(error instanceof ProtocolError, error.stack);
      assert.equal(error.about, about, `${method}: ${error.message}`);
      return true;
    });
  }
});
