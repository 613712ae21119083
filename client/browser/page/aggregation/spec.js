// The parameters of a session, as aggregation/spec.py and aggregation/vector.py. Contradictions are refused on reading.

import { ConfigError } from "../errors.js";
import { normSquared, spentOn } from "./accounting.js";
import { DISCRETE_GAUSSIAN, MAX_DEVIATION, SKELLAM, reach } from "./noise.js";
import { choice, optional, real, record, sequence, text, uint, uint64 } from "./wire.js";

export const MAX_ROUNDS = 1024;
const MAX_SIZE = 2 ** 27; // elements
const MAX_CLIENTS = 2 ** 20;
const MAX_SEGMENTS = 4096;
const WRAP_BITS = 40; // noise takes a sum beyond its reach with a probability of at most 2^-WRAP_BITS
const [SMALLEST, LARGEST] = [2 ** -100, 2 ** 100]; // bounds of a segment
const U32 = uint(32);
export const HEX = text("[0-9a-f]{64}");

const SEGMENT = record({ name: text("[A-Za-z0-9_./-]{1,128}"), size: U32, bound: real, noise: real }, (segment) => {
  const within = (value) => SMALLEST <= value && value <= LARGEST;
  requireRules(segment, "segment", {
    size: [1 <= segment.size && segment.size <= MAX_SIZE, `between 1 and ${MAX_SIZE}`],
    bound: [within(segment.bound), "between 2^-100 and 2^100"],
    noise: [segment.noise === 0 || within(segment.noise), "0, or between 2^-100 and 2^100"],
  });
});

const VECTOR = record({ segments: sequence(SEGMENT, MAX_SEGMENTS), ring_bits: uint(8), max_clients: U32 }, (vector) => {
  const { segments, ring_bits: bits, max_clients: clients } = vector;
  if (bits < 1 || bits > 64) throw new ConfigError(`ring of ${bits} bits is not between 1 and 64`, "ring.bits");
  if (!segments.length || new Set(segments.map(({ name }) => name)).size !== segments.length) {
    throw new ConfigError(`a vector has 1 to ${MAX_SEGMENTS} segments, each with its own name`, "vector.segments");
  }
  requireRules({ ...vector, size: sizeOf(vector) }, "vector", {
    size: [sizeOf(vector) <= MAX_SIZE, `at most ${MAX_SIZE}`],
    max_clients: [1 <= clients && clients <= MAX_CLIENTS, `between 1 and ${MAX_CLIENTS}`],
  });
  if (maxSteps(vector) < 1) {
    throw new ConfigError(`a ring of ${bits} bits cannot hold a sum of ${clients} clients`, "vector.ring_bits");
  }
  for (const segment of segments) stepOf(vector, segment);
});

const PRIVACY = record({ mechanism: choice(SKELLAM, DISCRETE_GAUSSIAN), honest: U32, delta: real }, ({ delta }) => {
  if (!(0 < delta && delta < 1)) throw new ConfigError(`${delta} is not between 0 and 1`, "spec.privacy.delta");
});

const GROUPING = record({ count: U32, minimum: U32 }, (grouping) => {
  const { count, minimum } = grouping;
  requireRules(grouping, "spec.grouping", { count: [count >= 2, "2 or more"], minimum: [minimum >= 2, "2 or more"] });
});

export const ACTIVE = "active";
export const OBSERVED = "observed"; // segment of what devices answered, in which it demands as much
export const CELLS = "cells"; // segment of what devices' texts are about, in which it demands as much
export const COUNTS = "counts"; // segment of the right answers that an evaluation counts; a device demands noise in it (policy.js)
export const HONEST_BUT_CURIOUS = "honest-but-curious";

export const SESSION_SPEC = record(
  {
    rounds: U32,
    threshold: U32,
    minimum_survivors: U32,
    degree: U32,
    vector: VECTOR,
    clip_norm: real,
    weight_cap: uint64,
    privacy: optional(PRIVACY),
    base_digest: HEX,
    layout_digest: HEX,
    adversary: choice(ACTIVE, HONEST_BUT_CURIOUS),
    grouping: optional(GROUPING),
  },
  (spec) => {
    const { rounds, threshold, minimum_survivors: least, degree, clip_norm: norm, weight_cap: cap } = spec;
    const clients = spec.vector.max_clients;
    requireRules(spec, "spec", {
      rounds: [1 <= rounds && rounds <= MAX_ROUNDS, `between 1 and ${MAX_ROUNDS}`],
      threshold: [2 <= threshold && threshold <= degree + 1, `between 2 and degree + 1 = ${degree + 1}`],
      minimum_survivors: [threshold <= least && least <= clients, `between the threshold and max_clients ${clients}`],
      degree: [degree < clients, `below max_clients ${clients}`],
      clip_norm: [norm > 0, "a positive number"],
      weight_cap: [1n <= cap && cap <= 2n ** 32n, "between 1 and 2^32"],
    });
    const { grouping } = spec;
    if (grouping !== null && spec.adversary !== ACTIVE) {
      throw new ConfigError("groups need the consistency check", "spec.grouping.adversary");
    }
    if (grouping !== null && grouping.count * grouping.minimum > clients) {
      throw new ConfigError(`so many groups do not fit max_clients ${clients}`, "spec.grouping.count");
    }
    requireNoise(spec);
  },
);

/** Returns if all of the vector has noise, and it is accounted for, or none of it. */
function requireNoise(spec) {
  const { privacy, weight_cap: cap, minimum_survivors: least } = spec;
  const { segments } = spec.vector;
  const noisy = segments.filter(({ noise }) => noise);
  if (privacy === null) {
    if (noisy.length) throw new ConfigError("the vector has noise, and no mechanism is named", "spec.privacy");
    return;
  }
  if (noisy.length !== 1 || segments.length !== 1 || cap !== 1n) {
    throw new ConfigError("with noise, a vector consists of one segment, which has noise, and the weight cap is 1", "spec.privacy");
  }
  if (!(1 <= privacy.honest && privacy.honest <= smallestSum(spec))) {
    const text = `is not between 1 and ${smallestSum(spec)}, the smallest sum`;
    throw new ConfigError(`privacy.honest ${privacy.honest} ${text}`, "spec.privacy.honest");
  }
  spentIn(spec, least);
}

/** Check rules, each { name: [whether it holds, what is expected] } of a field. Throws ConfigError. */
function requireRules(value, what, rules) {
  for (const [name, [holds, expected]] of Object.entries(rules)) {
    if (!holds) throw new ConfigError(`${name} ${value[name]} is not ${expected}`, `${what}.${name}`);
  }
}

/** Consistency signatures that a device requires before it reveals shares, in an active session. */
export function quorumOf(spec) {
  return spec.degree === spec.vector.max_clients - 1 ? spec.threshold : spec.minimum_survivors;
}

export const smallestSum = ({ grouping, minimum_survivors: least }) => grouping?.minimum ?? least;

/** How many devices add the noise of a sum over so many `survivors` that the account counts on, if `corrupt` may add none. */
export function honestIn(spec, survivors, corrupt = 0) {
  const assumed = spec.privacy ? smallestSum(spec) - spec.privacy.honest : 0;
  return (spec.grouping ? smallestSum(spec) : survivors) - Math.max(corrupt, assumed);
}

/** The standard deviation of the noise in the smallest sum over the clip norm; 0 without noise. */
export function noiseMultiplier(spec, corrupt = 0) {
  if (spec.privacy === null) return 0;
  const honest = Math.max(0, honestIn(spec, spec.minimum_survivors, corrupt));
  return (spec.vector.segments[0].noise * Math.sqrt(honest)) / spec.clip_norm;
}

/** What a round reveals of one device in a session with noise (accounting.js); arguments as of `honestIn`. With groups, each sum counts
 * as the smallest. Throws ConfigError: no honest device is left, or a number is out of range. */
export function spentIn(spec, survivors, corrupt = 0) {
  const [segment] = spec.vector.segments;
  const step = stepOf(spec.vector, segment);
  return spentOn({
    mechanism: spec.privacy.mechanism,
    size: segment.size,
    norm_squared: normSquared(spec.clip_norm / step, segment.size),
    variance: (segment.noise / step) ** 2,
    honest: honestIn(spec, survivors, corrupt),
  });
}

export const sizeOf = ({ segments }) => segments.reduce((sum, { size }) => sum + size, 0);

/** Largest magnitude of one client's element, in steps; at most 2^40. */
export function maxSteps({ ring_bits: bits, max_clients: clients }) {
  const most = ((1n << BigInt(bits - 1)) - 1n) / BigInt(clients);
  return most < 2n ** 40n ? Number(most) : 2 ** 40;
}

/** Resolution of a segment: the finest power of two with which `maxSteps` of them reach its bound. With noise, the finest one with which
 * the sum of all values and their noise is below half the ring, and the noise of one device has at most `MAX_DEVIATION` steps. Throws
 * ConfigError: the noise does not fit the ring. */
export function stepOf(vector, segment) {
  const { bound, noise } = segment;
  const largest = Math.max(bound, Math.fround(bound)); // float32 values that are clipped to the bound are within it
  if (noise) return noisyStep(vector, segment, largest);
  const step = powerBelow(largest / maxSteps(vector));
  return Math.ceil(largest / step) <= maxSteps(vector) ? step : 2 * step;
}

function noisyStep({ ring_bits: bits, max_clients: clients }, { size, noise }, largest) {
  const odds = Math.LN2 * (WRAP_BITS + 1) + Math.log(size); // either side of each element
  const half = 2 ** (bits - 1) - 1;
  for (let step = powerBelow(Math.max(noise / MAX_DEVIATION, largest / 2 ** 40)); step <= largest; step *= 2) {
    const most = clients * Math.ceil(largest / step) + Math.floor(reach(clients * (noise / step) ** 2, odds));
    if (noise <= MAX_DEVIATION * step && most <= half) return step;
  }
  const text = `a ring of ${bits} bits cannot hold the sum of ${clients} clients with noise of ${noise}: use more bits`;
  throw new ConfigError(text, "vector.ring_bits");
}

/** The greatest power of two that is not above `x`, a normal number. */
function powerBelow(x) {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, x);
  view.setBigUint64(0, view.getBigUint64(0) & (0x7ffn << 52n)); // the exponent, without the fraction
  return view.getFloat64(0);
}
