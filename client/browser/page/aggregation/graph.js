// The masking graph and how many neighbors are enough, as aggregation/graph.py; binomials are exact integers.

import { concat, digest, encode as utf8, hex } from "../bytes.js";
import { ConfigError } from "../errors.js";

export const COMPLETE_UP_TO = 128; // devices: up to here every device is every other's neighbor
export const SIGMA = 40; // bits: a session is insecure with a probability of at most 2^-40
export const GRINDING = 40; // bits: an active coordinator may try 2^40 rosters

/** Devices in ascending order of SHA-256 of a tag, bytes and their id. */
export async function digestOrder(tag, bound, devices) {
  const places = [];
  for (const device of devices) places.push([hex(await digest(concat(utf8(tag), bound, utf8(device)))), device]);
  return places.sort(([a], [b]) => (a < b ? -1 : 1)).map(([, device]) => device);
}

/** Devices in their ring order in the session `context`. */
export const hararyOrder = (context, devices) => digestOrder("edgeadapt/harary/1\0", context, devices);

/** A Map of device → the Set of its neighbors, `degree / 2` on either side in the ring order. */
export function hararyNeighbors(order, degree) {
  if (degree % 2 || degree < 2 || degree >= order.length) {
    throw new ConfigError(`degree ${degree} is not an even number between 2 and ${order.length - 1}`, "spec.degree");
  }
  const steps = Array.from({ length: degree + 1 }, (_, i) => i - degree / 2).filter(Boolean);
  return new Map(
    order.map((device, place) => [device, new Set(steps.map((step) => order.at((place + step) % order.length)))]),
  );
}

/** `fraction` of `devices` as a count, rounded up. */
export const countOf = (devices, fraction) => Math.ceil(fraction * devices - 1e-9);

/** Twice the fewest honest devices that a combination of two or more sums from one adapter leaves, less dropped ones. */
export function leftOver(devices, corrupt, degree, threshold, survivors) {
  if (degree >= devices - 1) return 2 * (2 * threshold - devices - corrupt);
  const honest = Math.max(0, survivors - corrupt);
  return Math.floor((2 * honest * (2 * threshold - degree - 1)) / (degree + 1)) - 4 * corrupt;
}

/** Whether a session on a Harary graph fails with a probability of at most 2^-`bits`. */
export function isSecure(devices, corrupt, degree, threshold, bits) {
  if (corrupt >= devices || degree % 2) return false;
  const both = devices * hypergeometricTail(devices - 1, corrupt, degree, 2 * threshold - degree - 1);
  const split = twoWindows(devices, corrupt, degree / 2, threshold - 1 - degree / 2);
  return Math.max(both, split) <= 2 ** -bits;
}

/** P[at least `least` of `drawn` are marked], drawing without replacement. */
export function hypergeometricTail(population, marked, drawn, least) {
  let ways = 0n;
  for (let i = Math.max(least, 0, drawn + marked - population); i <= Math.min(marked, drawn); i++) {
    ways += choose(marked, i) * choose(population - marked, drawn - i);
  }
  return ratio(ways, choose(population, drawn));
}

function twoWindows(devices, marked, width, least) {
  if (2 * least > marked) return 0;
  return Number(choose(devices, 2)) * hypergeometricTail(devices, marked, width, least) ** 2;
}

function choose(n, k) {
  if (k < 0 || k > n) return 0n;
  let found = 1n;
  for (let i = 1; i <= k; i++) found = (found * BigInt(n - k + i)) / BigInt(i);
  return found;
}

/** The double nearest to over / under, which is at most 1. */
function ratio(over, under) {
  if (!over) return 0;
  const shift = under.toString(2).length - over.toString(2).length + 64;
  const scaled = over << BigInt(shift);
  const sticky = scaled % under ? 1n : 0n; // so that a rest is not taken for a tie
  return Number((scaled / under) | sticky) * 2 ** -(shift >> 1) * 2 ** -(shift - (shift >> 1));
}
