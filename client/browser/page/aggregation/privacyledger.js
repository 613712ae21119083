// What the sums to which a device contributed may have revealed of it, and the owner's limit on that, as client/node/privacyledger.py: {
// settled, pending, noisy, bare }. A contribution counts before it leaves, as part of the smallest sum that the session allows. Once the
// device reveals its shares it knows the survivors, and their number takes the place of the smallest. `settled` and `pending` are as of
// accounting.js; `noisy` and `bare` count contributions with and without noise, of which nothing bounds the latter.

import { TrustError } from "../errors.js";
import { NOTHING, ORDERS, epsilonOf, together } from "./accounting.js";
import { countOf } from "./graph.js";
import { refuse } from "./messages.js";
import { spentIn } from "./spec.js";

export const EMPTY = Object.freeze({ settled: NOTHING, pending: NOTHING, noisy: 0, bare: 0 });

/** A stored ledger. Throws TrustError: it is damaged. */
export function requireLedger(found) {
  const counts = (value) => Number.isSafeInteger(value) && value >= 0;
  const account = ({ curve, draws }) => curve.length === ORDERS.length && curve.every((x) => 0 <= x && x < Infinity) && counts(draws);
  try {
    if (account(found.settled) && account(found.pending) && counts(found.noisy) && counts(found.bare)) return found;
  } catch {
    // refused below
  }
  throw new TrustError("the account of the privacy that this browser spent is damaged; clear the page's data to start anew", "privacy");
}

/** Of everything that left the device with noise. */
export const spent = ({ settled, pending }) => together(settled, pending);

/** The ledger to store before the contribution to a round leaves, of a session with a `cohort` of so many devices. Throws ProtocolError:
 * it would exceed the policy's `maximum_epsilon`. */
export function onPlan(known, spec, cohort, { corrupt_fraction: fraction, maximum_epsilon: limit, delta }) {
  const settled = spent(known);
  if (spec.privacy === null) return { ...known, settled, pending: NOTHING, bare: known.bare + 1 };
  const cost = spentIn(spec, spec.minimum_survivors, countOf(cohort, fraction));
  const after = epsilonOf(together(settled, cost), delta);
  if (limit && after > limit) {
    const text = `it would take the privacy that this device spends to an epsilon of ${after.toFixed(2)}, above its policy's`;
    refuse(`plan refused: ${text} maximum_epsilon of ${limit} for delta ${delta}`, "plan.epsilon");
  }
  return { ...known, settled, pending: cost, noisy: known.noisy + 1 };
}

/** The ledger to store before the device reveals shares for a sum over so many `survivors`. */
export function onSurvivors(known, spec, cohort, survivors, { corrupt_fraction: fraction }) {
  if (spec.privacy === null) return known;
  const exact = spentIn(spec, survivors, countOf(cohort, fraction));
  return { ...known, settled: together(known.settled, exact), pending: NOTHING };
}
