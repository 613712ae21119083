// The dealer's half of Shamir's secret sharing over the integers modulo 2^256 + 297, as aggregation/shamir.py.

import { hex, unhex } from "../bytes.js";
import { ConfigError } from "../errors.js";
import { SHARE } from "./messages.js";

export const PRIME = 2n ** 256n + 297n;
const DRAW = 48; // bytes: reduced mod p, 384 bits are uniform to within a distance of 2^-127

const whole = (bytes) => BigInt(`0x${hex(bytes)}`);
const share = (value) => unhex(value.toString(16).padStart(2 * SHARE, "0"));

/**
 * One share of 33 bytes of `secret` (32 bytes) for each of `points`, distinct positive numbers; any `threshold` of them
 * reconstruct it. `entropy` draws the coefficients, the highest power first.
 */
export async function split(secret, threshold, points, entropy) {
  if (secret.length !== 32 || threshold < 1 || threshold > new Set(points).size || Math.min(...points) < 1) {
    throw new ConfigError(`cannot share ${secret.length} bytes among ${points.length} points`, "shamir.split");
  }
  const drawn = await entropy(DRAW * (threshold - 1));
  const coefficients = Array.from({ length: threshold - 1 }, (_, i) => whole(drawn.subarray(DRAW * i, DRAW * (i + 1))) % PRIME);
  drawn.fill(0);
  coefficients.push(whole(secret));
  return points.map((x) => share(coefficients.reduce((value, next) => (value * BigInt(x) + next) % PRIME, 0n)));
}
