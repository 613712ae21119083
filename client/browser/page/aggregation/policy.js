// What a device requires of an offer before it takes part, as aggregation/policy.py, with the same defaults. One thing is stricter here:
// rings have at most 32 bits (docs/decisions/0048-browser-as-a-device.md).

import { ConfigError, ProtocolError } from "../errors.js";
import { COMPLETE_UP_TO, GRINDING, SIGMA, countOf, isSecure, leftOver } from "./graph.js";
import { COORDINATOR } from "./messages.js";
import { ACTIVE, CELLS, COUNTS, OBSERVED, noiseMultiplier, quorumOf, smallestSum } from "./spec.js";

const honestOf = ({ minimum_cohort: cohort, corrupt_fraction: fraction }) => cohort - countOf(cohort, fraction);
const FROM_0 = [(value) => 0 <= value && value < Infinity, "a number from 0 on"];
// Each limit: its default and, where not every value will do, the check of one in a policy, and what it demands.
const LIMITS = {
  known_bases: [[]], // SHA-256 of the frozen bases that this device holds, in hex
  minimum_cohort: [8, (value) => value >= 3, "3 or more: a sum of two shows each the other's part"],
  // Honest devices, in a sum and in combinations of sums.
  minimum_survivors: [4, (value, policy) => 2 <= value && value <= honestOf(policy), "between 2 and minimum_cohort less its corrupt_fraction"],
  minimum_ring_bits: [16, (value, { maximum_ring_bits: high }) => 1 <= value && value <= high, "between 1 and maximum_ring_bits"],
  maximum_ring_bits: [32, (value) => value <= 32, "32 or less"],
  adversaries: [[ACTIVE]],
  corrupt_fraction: [0.1, (value) => 0 <= value && value < 1, "in [0, 1)"],
  complete_up_to: [COMPLETE_UP_TO],
  maximum_weight: [65_536],
  maximum_rounds: [64],
  maximum_repeats: [3, (value) => 0 <= value && value <= 15, "between 0 and 15"], // sums from an adapter after the first one
  minimum_movement: [0.02, ...FROM_0], // of an adapter since a sum without noise over other devices, as a share of the longest step of training
  minimum_noise_multiplier: [0, ...FROM_0], // of the smallest sum, in clip norms; above 0, a session must have noise
  // The same of a session that counts right answers.
  minimum_evaluation_noise: [1, (value) => 0 < value && value < Infinity, "a number above 0"],
  maximum_epsilon: [0, ...FROM_0], // that all contributions together may reveal, for `delta`; above 0, a session must have noise; 0: no limit
  delta: [1e-6, (value) => 0 < value && value < 1, "between 0 and 1"],
  demand_proofs: [true], // whether to take part again only if the coordinator proves what its log holds
  revocation_days: [0, (value) => value >= 0, "0 or more"], // greatest age of the authority's revocation list; 0: no list is required
};

/** Limits on the sessions that a device joins; `given` replaces defaults. Throws ConfigError: a value is out of range. */
export class Policy {
  constructor(given = {}) {
    for (const [name, [value]] of Object.entries(LIMITS)) this[name] = value;
    Object.assign(this, given);
    for (const name of Object.keys(this)) {
      if (!Object.hasOwn(LIMITS, name)) throw new ConfigError(`${name} is not a limit of a policy`, `policy.${name}`);
      const [, check, expected] = LIMITS[name];
      if (check && !check(this[name], this)) throw new ConfigError(`${name} ${this[name]} is not ${expected}`, `policy.${name}`);
    }
    Object.freeze(this);
  }

  /** Returns if this device may join a session of `spec` with so many devices; else throws ProtocolError. */
  check(spec, cohort) {
    refuse("offer", this.#offerRules(spec, cohort));
  }

  /** Returns if the graph is secure with `roster` of the `cohort` devices, all corrupt ones among them. */
  checkRoster(spec, cohort, roster) {
    refuse("roster", this.#graphRules(spec, cohort, roster));
  }

  #graphRules(spec, cohort, present) {
    const [corrupt, least] = [countOf(cohort, this.corrupt_fraction), this.minimum_survivors];
    const { degree, threshold } = spec;
    const left = leftOver(present, corrupt, degree, threshold, spec.minimum_survivors);
    const few = `sums of one adapter could be combined to ${Math.max(left, 0)} honest devices, below this device's ${least}`;
    const combined = [left >= least, "combined", few];
    if (degree >= present - 1) {
      const text = `threshold ${threshold} of ${present} does not withstand ${corrupt} corrupt devices`;
      return [[2 * threshold > present + corrupt, "threshold", text], combined];
    }
    const bits = SIGMA + (spec.adversary === ACTIVE ? GRINDING : 0);
    const weak = `degree ${degree} and threshold ${threshold} of ${present} devices do not withstand ${corrupt} corrupt ones`;
    return [
      [cohort > this.complete_up_to, "degree", `degree ${degree} is not the complete graph of ${present} devices`],
      [isSecure(present, corrupt, degree, threshold, bits), "graph", weak],
      combined,
    ];
  }

  #offerRules(spec, cohort) {
    const corrupt = countOf(cohort, this.corrupt_fraction);
    const { threshold, adversary, base_digest: base, weight_cap: weight, rounds } = spec;
    const { ring_bits: bits, max_clients: clients } = spec.vector;
    // All corrupt devices may be in one group, which the coordinator can try for.
    const [quorum, honest] = [quorumOf(spec), smallestSum(spec) - corrupt];
    const inRing = this.minimum_ring_bits <= bits && bits <= this.maximum_ring_bits;
    const twoGroups = `${quorum} of ${cohort} devices sign the survivor set: two groups could sign different sets`;
    const few = `a sum may have ${honest} honest devices, below this device's ${this.minimum_survivors}`;
    const own = (value) => `this device's ${value}`;
    return [
      [cohort >= this.minimum_cohort, "cohort", `cohort of ${cohort} is below ${own(this.minimum_cohort)}`],
      [threshold <= cohort, "threshold", `threshold ${threshold} is above the cohort of ${cohort}`],
      [clients >= cohort, "max_clients", `a sum of ${cohort} could wrap the ring`],
      ...this.#graphRules(spec, cohort, cohort),
      [honest >= this.minimum_survivors, "minimum_survivors", few],
      [adversary !== ACTIVE || 2 * quorum > cohort + corrupt, "quorum", twoGroups],
      [inRing, "ring_bits", `ring of ${bits} bits is outside this device's limits`],
      [this.adversaries.includes(adversary), "adversary", `this device does not accept the adversary model ${adversary}`],
      [this.known_bases.includes(base), "base_digest", `base ${base.slice(0, 12)} is not on this device`],
      [weight <= this.maximum_weight, "weight_cap", `weight cap ${weight} is over ${own(this.maximum_weight)}`],
      [rounds <= this.maximum_rounds, "rounds", `session of ${rounds} rounds is over ${own(this.maximum_rounds)}`],
      ...this.#noiseRules(spec, corrupt),
    ];
  }

  #noiseRules(spec, corrupt) {
    const counts = [COUNTS, OBSERVED, CELLS].includes(spec.vector.segments[0].name) ? this.minimum_evaluation_noise : 0;
    const [found, least] = [noiseMultiplier(spec, corrupt), Math.max(this.minimum_noise_multiplier, counts)];
    const demanded = least > 0 || this.maximum_epsilon > 0;
    const little = `noise multiplier ${found}, without ${corrupt} corrupt devices, is below this device's ${least}`;
    return [
      [spec.privacy !== null || !demanded, "privacy", "the session adds no noise to its sums, and this device's policy demands it"],
      [found >= least, "noise_multiplier", little],
    ];
  }
}

function refuse(what, rules) {
  for (const [holds, field, reason] of rules) {
    if (!holds) throw new ProtocolError(`${what} refused: ${reason}`, `${what}.${field}`, COORDINATOR);
  }
}
