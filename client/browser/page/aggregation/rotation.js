// The public random rotation of an update, as aggregation/rotation.py, to the same bits.

import { concat, digest, encode as utf8 } from "../bytes.js";
import { keystream, streamKey } from "./masks.js";

const EXCESS_BITS = 40; // the bound `peak` fails with a probability of at most 2^-40

/** The seed (32 bytes) of the rotation of all updates of an adapter. `adapter`: SHA-256 of its file, 32 bytes. */
export const seedOf = (adapter) => digest(concat(utf8("edgeadapt/rotation/1\0"), adapter));

/** Bound on the coordinates of a rotated vector of norm 1 and `size` coordinates. */
export function peak(size) {
  const exponent = EXCESS_BITS + 1 + (size > 1 ? 32 - Math.clz32(size - 1) : 0);
  return Math.min(1, Math.sqrt((2 * Math.LN2 * exponent) / orderOf(size)));
}

/** The rotated `vector` (Float64Array, which is not changed). */
export async function rotate(vector, seed) {
  const [out, order] = [vector.slice(), orderOf(vector.length)];
  const octets = Math.ceil(order / 8);
  const signs = await keystream(await streamKey(seed), 0, 2 * octets);
  for (const [at, bits] of [[0, signs.subarray(0, octets)], [vector.length - order, signs.subarray(octets)]]) {
    const part = out.subarray(at, at + order);
    for (let i = 0; i < order; i++) if ((bits[i >> 3] >> (i & 7)) & 1) part[i] = -part[i];
    hadamard(part);
  }
  return out;
}

/** The greatest power of two that is not above `size`. */
const orderOf = (size) => 2 ** (31 - Math.clz32(size));

/** Multiplies by Sylvester's Hadamard matrix of order P, a power of two, then by the double next to 1 / √P, in place. */
function hadamard(x) {
  const size = x.length;
  const largest = x.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  // Rounded so that every sum of P of them with signs is exact: no order of additions matters.
  const exponent = 53 - Math.log2(size) - exponentOf(largest);
  for (let i = 0; i < size; i++) x[i] = nearest(scaled(x[i], exponent));
  for (let h = 1; h < size; h *= 2) {
    for (let start = 0; start < size; start += 2 * h) {
      for (let i = start; i < start + h; i++) {
        const [a, b] = [x[i], x[i + h]];
        x[i] = a + b;
        x[i + h] = a - b;
      }
    }
  }
  const factor = Math.sqrt(1 / size);
  for (let i = 0; i < size; i++) x[i] = scaled(x[i], -exponent) * factor + 0; // zeros without a sign
}

/** The least whole e with x < 2^e, for x > 0; 0 for 0. */
function exponentOf(x) {
  if (x === 0) return 0;
  if (x < 2 ** -1022) return exponentOf(x * 2 ** 54) - 54;
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, x);
  return ((view.getUint16(0) >> 4) & 0x7ff) - 1022;
}

/** x · 2^exponent, where the power alone may not be a double. */
function scaled(x, exponent) {
  const half = Math.trunc(exponent / 2);
  return x * 2 ** half * 2 ** (exponent - half);
}

/** The nearest whole number; of two, the even one. */
function nearest(x) {
  const low = Math.floor(x);
  const rest = x - low;
  return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
}
