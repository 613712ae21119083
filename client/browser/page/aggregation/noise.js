// Integer noise of one device, from a cryptographic bit stream and without floating point, as aggregation/privacy/noise.py: equal
// bits, equal noise. A distribution is a table of its cumulative probabilities in units of 2^-128, with which uniform bits are
// compared (docs/decisions/0037-integer-noise.md).

import { ConfigError } from "../errors.js";

export const SKELLAM = "skellam";
export const DISCRETE_GAUSSIAN = "discrete-gaussian";
export const MAX_DEVIATION = 2 ** 10; // steps
const [BITS, GUARD] = [128n, 64n];
const TAIL = 129 * Math.LN2; // the outcomes beyond a table have a probability of at most 2^-128 on both sides
const CHUNK = 2 ** 15; // draws whose bits are read at a time
const GUIDE = 16; // leading bits of a draw, by which it finds its place in a table
const FINE = 512n; // bits of fractions from which an exponential is computed
const TABLES = 8; // that are kept
const tables = new Map();

/** What noise exceeds, on one side, with a probability of at most exp(-`logOdds`), as `reach` of noise.py. */
export const reach = (variance, logOdds) => Math.sqrt(2 * variance * logOdds) + logOdds / 3;

/** A symmetric distribution over the integers, as cumulative probabilities. */
export class Table {
  /** The table of outcomes -n…n, whose probabilities are proportional to `weights`, BigInts, of 0…n. */
  constructor(weights) {
    const both = [...weights.slice(1).reverse(), ...weights];
    const total = both.reduce((sum, each) => sum + each, 0n);
    const size = both.length - 1;
    this.first = 1 - weights.length;
    // Outcome `first + k` is drawn where exactly k boundaries are at or below 128 uniform bits; these are the halves of the boundaries.
    [this.high, this.low] = [new BigUint64Array(size), new BigUint64Array(size)];
    let sum = 0n;
    for (let k = 0; k < size; k++) {
      sum += both[k];
      const bound = (sum << BITS) / total;
      const most = (1n << BITS) - 1n;
      const kept = bound < most ? bound : most;
      [this.high[k], this.low[k]] = [kept >> 64n, kept]; // of which the low 64 bits are stored
    }
    this.guide = this.#guides();
  }

  /** How many boundaries are at or below a draw that begins with these bits, at least. */
  #guides() {
    const guide = new Uint32Array(2 ** GUIDE);
    for (let bits = 0, below = 0; bits < guide.length; bits++) {
      while (this.high[below] <= BigInt(bits) << 48n) below++;
      guide[bits] = below;
    }
    return guide;
  }

  async draw(entropy, size) {
    const drawn = new Int32Array(size);
    for (let start = 0; start < size; start += CHUNK) {
      const part = drawn.subarray(start, start + CHUNK);
      const bytes = await entropy(8 * part.length);
      const words = new DataView(bytes.buffer, bytes.byteOffset);
      const ties = [];
      for (let i = 0; i < part.length; i++) {
        const word = words.getBigUint64(8 * i, true);
        let below = this.guide[words.getUint16(8 * i + 6, true)];
        while (this.high[below] <= word) below++;
        if (this.high[below - 1] === word) ties.push(i);
        part[i] = below + this.first;
      }
      for (const i of ties) part[i] = (await this.#byNextWord(part[i] - this.first, entropy)) + this.first;
    }
    return drawn;
  }

  /** The boundaries at or below a draw whose first 64 bits are those of the last of `below` boundaries: of 2^48 draws, about one. */
  async #byNextWord(below, entropy) {
    const bytes = await entropy(8);
    const following = new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true);
    let at = below - 1;
    while (this.high[at - 1] === this.high[below - 1]) at--;
    while (at < below && this.low[at] <= following) at++;
    return at;
  }
}

/** The table of the noise of one device. `variance`: in squared steps, at most `MAX_DEVIATION` squared; of a discrete Gaussian the
 * parameter σ². Throws ConfigError: it is out of range. */
export function table(mechanism, variance) {
  if (!(0 < variance && variance <= MAX_DEVIATION ** 2)) {
    const text = `noise with a variance of ${variance} squared steps is not between 0 and ${MAX_DEVIATION}² of them`;
    throw new ConfigError(text, "noise.variance");
  }
  const name = `${mechanism}/${variance}`;
  if (!tables.has(name)) {
    if (tables.size === TABLES) tables.delete(tables.keys().next().value);
    const last = Math.ceil(reach(variance, TAIL)) + 1;
    const weights = mechanism === SKELLAM ? skellamWeights : gaussianWeights;
    tables.set(name, new Table(weights(fraction(variance), last)));
  }
  return tables.get(name);
}

/** Noise of one device for one segment, an Int32Array in steps, as `Table.draw`; arguments and errors as of `table`. */
export const draw = (mechanism, variance, size, entropy) => table(mechanism, variance).draw(entropy, size);

/** A positive double as the fraction that it is: [numerator, denominator], BigInts. */
function fraction(x) {
  let exponent = 0;
  while (!Number.isInteger(x)) [x, exponent] = [2 * x, exponent + 1]; // exact
  return [BigInt(x), 1n << BigInt(exponent)];
}

/** Numbers proportional to the probabilities of 0…`last` under Skellam noise: I_k(v), by Miller's recurrence downward. */
function skellamWeights([numerator, denominator], last) {
  let above = 0n;
  const weights = [1n << (BITS + GUARD)];
  for (let k = last; k > 0; k--) {
    const at = weights.at(-1);
    weights.push(above + (2n * BigInt(k) * denominator * at) / numerator);
    above = at;
  }
  return weights.reverse();
}

/** Numbers proportional to the probabilities of 0…`last` under a discrete Gaussian: exp(-k² / 2σ²). */
function gaussianWeights([numerator, denominator], last) {
  const one = 2n * BITS;
  let ratio = exponential((denominator << FINE) / (2n * numerator)) >> (FINE - one);
  const square = (ratio * ratio) >> one;
  const weights = [1n << one];
  for (let k = 0; k < last; k++) {
    // Each weight is the one before times exp(-(2k + 1) / 2σ²).
    weights.push((weights.at(-1) * ratio) >> one);
    ratio = (ratio * square) >> one;
  }
  return weights;
}

/** exp(-x) of a fraction of `FINE` bits, from 0 on: the series of a 2^-16th part of x, squared 16 times. */
function exponential(x) {
  const one = 1n << FINE;
  let [sum, term] = [one, one];
  for (let n = 1n; term; n++) {
    term = (term * x) / (n << (FINE + 16n));
    sum += n % 2n ? -term : term;
  }
  for (let i = 0; i < 16; i++) sum = (sum * sum) >> FINE;
  return sum;
}
