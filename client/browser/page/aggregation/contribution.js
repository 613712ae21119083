// From an update to a clipped, weighted, rotated vector in fixed point, as edgeadapt/rounds/task.py and
// aggregation/vector.py and ring.py. The vector is all that a device sends of its data, and it is sent under the mask.

import { unhex } from "../bytes.js";
import { DataError } from "../errors.js";
import { roundWithin } from "./accounting.js";
import { KEY, derivedEntropy, keystream, streamKey, systemEntropy } from "./masks.js";
import { refuse } from "./messages.js";
import { draw } from "./noise.js";
import { peak, rotate, seedOf } from "./rotation.js";
import { COUNTS, maxSteps, sizeOf, stepOf } from "./spec.js";

const SHRINK = 1 - 2 ** -40; // keeps a clipped coordinate within its bound however the division rounds
const COIN_BITS = 23; // of a rounding coin
const MAX_LOSS = 20; // nats, of one example (edgeadapt/rounds/task.py)

/** The segments of an update of `size` numbers, [[name, size, bound]], as `Task.vector` of edgeadapt/rounds/task.py. */
export function updateSegments(spec, size) {
  if (spec.privacy) return noisySegments("delta", size, spec);
  return [["delta", size, spec.clip_norm * Number(spec.weight_cap) * peak(size)], ...metricSegments(spec)];
}

/** The segments of moments of embeddings of `d` numbers with `k` labels, as `AnalyticTask.vector` of edgeadapt/rounds/analytic.py. */
export function momentSegments(spec, d, k) {
  if (spec.privacy) return noisySegments("corrections", d * k, spec);
  const cap = Number(spec.weight_cap);
  return [["xx", (d * (d + 1)) / 2, cap], ["xy", d * k, cap], ...metricSegments(spec)];
}

/** The segment of the counts of an evaluation, as `counts_spec` of edgeadapt/rounds/evaluation.py. */
export const countSegments = (spec) => noisySegments(COUNTS, 4, spec);

/** The one segment of a vector with noise, as `noisy_spec` of edgeadapt/rounds/sums.py. */
const noisySegments = (name, size, { clip_norm: norm }) => [[name, size, norm * peak(size)]];

/** The segments of the metrics, as `metric_segments` of edgeadapt/rounds/task.py. */
function metricSegments({ weight_cap: weight }) {
  const cap = Number(weight);
  return [["weight", 1, cap], ["correct", 1, cap], ["loss", 1, MAX_LOSS * cap], ["held_out", 1, cap]];
}

/** Returns if the vector in the offer is `fair`, [[name, size, bound]], and without noise counts up to the weight cap one by one, so
 * that it admits every contribution: a tighter bound would tell devices apart by whether they can answer. Throws ProtocolError. */
export function requireBounds(spec, fair) {
  const found = spec.vector.segments.map((segment) => [segment.name, segment.size, segment.bound]);
  if (JSON.stringify(found) === JSON.stringify(fair) && (spec.privacy || maxSteps(spec.vector) >= Number(spec.weight_cap))) return;
  const text = "the bounds of the vector in the offer do not follow from its clip norm and weight cap";
  refuse(text, "offer.spec.vector");
}

/** The contribution of a device as ring elements. `delta` is its update, a Float64Array; `examples` their number; `score` is { correct,
 * loss, count } of the adapter that it received on held-out examples. `adapter` is the digest in the plan, hex. Throws DataError: a
 * number is not finite, or a metric is outside its bound. */
export async function contribution({ delta, examples, score }, spec, adapter, entropy = systemEntropy) {
  const weight = Math.min(examples, Number(spec.weight_cap));
  const segment = spec.vector.segments.find(({ name }) => name === "delta");
  const rotated = await rotate(clip(delta, spec.clip_norm).map((x) => x * weight), await seedOf(unhex(adapter)));
  const step = stepOf(spec.vector, segment);
  const drawn = new DataView((await entropy(8 * rotated.length)).buffer);
  // Uniform over half a step to either side, also where the update is zero (edgeadapt.rounds.task.rounding_noise).
  const noisy = rotated.map((x, i) => x + step * (uniform(drawn, 8 * i) - 0.5));
  return encode(spec.vector, {
    delta: noisy.map((x) => within(x, segment.bound)),
    ...counted(weight, score),
  }, entropy);
}

/** The contribution of a device to a sum with noise, as `noisy_vector` of edgeadapt/rounds/sums.py.
 *
 * `vector`, a Float64Array, is clipped, rotated, and rounded until its norm is within that for which the session accounts; noise is then
 * added to whole numbers, so that the guarantee does not depend on how floating point rounds. `entropy` draws the rounding coins and then
 * the key of the noise. `adapter` and errors as of `contribution`. */
export async function noisyContribution(vector, spec, adapter, entropy = systemEntropy) {
  const [segment] = spec.vector.segments;
  const step = stepOf(spec.vector, segment);
  const rotated = await rotate(clip(vector, spec.clip_norm), await seedOf(unhex(adapter)));
  const steps = rotated.map((x) => within(x, segment.bound) / step);
  const found = await roundWithin(steps, spec.clip_norm / step, async () => {
    const drawn = new DataView((await entropy(8 * steps.length)).buffer);
    return steps.map((x, i) => Math.floor(x + uniform(drawn, 8 * i)));
  });
  const raw = await entropy(KEY);
  const key = await streamKey(raw);
  raw.fill(0);
  const noise = await draw(spec.privacy.mechanism, (segment.noise / step) ** 2, segment.size, derivedEntropy(key));
  return arrayType(spec.vector.ring_bits).from(found, (x, i) => x + noise[i]); // negative numbers in two's complement
}

/** The moments of a device's examples as ring elements: `xx`, `xy` and `count` as of `momentsOf`. If they are of more examples than the
 * weight cap, they are scaled down to it. `score` and errors as of `contribution`. */
export async function momentContribution({ xx, xy, count }, score, spec, entropy = systemEntropy) {
  const weight = Math.min(count, Number(spec.weight_cap));
  const share = count ? weight / count : 0;
  const bounded = (values) => values.map((x) => within(x * share, weight));
  return encode(spec.vector, { xx: bounded(xx), xy: bounded(xy), ...counted(weight, score) }, entropy);
}

const within = (x, bound) => Math.min(bound, Math.max(-bound, x));

const counted = (weight, { correct, loss, count }) => ({
  weight: Float64Array.of(weight),
  correct: Float64Array.of(correct),
  loss: Float64Array.of(loss),
  held_out: Float64Array.of(count),
});

/** A number in [0, 1) of 53 bits, as NumPy makes it of 64. */
const uniform = (drawn, at) => Number(drawn.getBigUint64(at, true) >> 11n) * 2 ** -53;

export function clip(delta, norm) {
  const length = Math.sqrt(delta.reduce((sum, x) => sum + x * x, 0));
  if (length > norm) return delta.map((x) => x * ((norm / length) * SHRINK));
  return delta.map((x) => Math.min(norm, Math.max(-norm, x)));
}

/** Rounds values to ring steps without bias (stochastic rounding): { name: Float64Array } of exactly the vector's segments. `entropy`
 * draws the key of the rounding coins, 32 bytes. */
export async function encode(vector, values, entropy = systemEntropy) {
  const key = await streamKey(await entropy(KEY));
  const coins = new Uint32Array((await keystream(key, 0, 4 * sizeOf(vector))).buffer);
  const out = new (arrayType(vector.ring_bits))(sizeOf(vector));
  if (Object.keys(values).length !== vector.segments.length) {
    throw new DataError(`segments ${Object.keys(values)} are not those of the spec`, "vector.segments");
  }
  let at = 0;
  for (const segment of vector.segments) {
    const given = values[segment.name];
    if (given?.length !== segment.size) {
      throw new DataError(`segment ${segment.name} does not have ${segment.size} numbers`, `vector.${segment.name}`);
    }
    const perUnit = 1 / stepOf(vector, segment);
    for (const value of given) {
      if (!(Math.abs(value) <= segment.bound)) {
        throw new DataError(`segment ${segment.name} has a value of ${value}, its bound is ${segment.bound}`, `vector.${segment.name}`);
      }
      const steps = value * perUnit;
      const whole = Math.floor(steps);
      const coin = (coins[at] >>> (32 - COIN_BITS)) * 2 ** -COIN_BITS;
      out[at++] = whole + Math.floor(steps - whole + coin); // negative numbers in two's complement
    }
  }
  return out;
}

/** The type of array that holds elements of the ring of integers mod 2^bits, up to 32 bits. */
export const arrayType = (bits) => (bits <= 16 ? Uint16Array : Uint32Array);

/** Returns if `values` is a vector of `size` elements of this ring; else throws DataError. */
export function requireVector(values, size, bits) {
  if (values instanceof arrayType(bits) && values.length === size) return;
  throw new DataError(`a ring vector of ${size} elements of ${bits} bits is needed`, "ring.vector");
}

/** The low `bits` bits of each element; the first element is in the lowest bits of the first byte. */
export function pack(values, bits) {
  if (bits === 8 * values.BYTES_PER_ELEMENT) return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const bytes = new Uint8Array(Math.ceil((values.length * bits) / 8));
  let [held, left, at] = [0, 0, 0]; // bits that wait for a byte: fewer than 8, so that 8 + 32 of them are exact
  for (const value of values) {
    held += (value % 2 ** bits) * 2 ** left;
    for (left += bits; left >= 8; left -= 8) {
      bytes[at++] = held % 256;
      held = Math.floor(held / 256);
    }
  }
  if (left) bytes[at] = held;
  return bytes;
}
