// Verifies proofs about the Merkle tree of a log (RFC 9162, section 2.1), as aggregation/transcript/merkle.py. Sizes are BigInts.

import { concat, digest, equal } from "../bytes.js";
import { TrustError } from "../errors.js";

const node = (left, right) => digest(concat([1], left, right)); // section 2.1.1: no leaf hash can be a node hash

/** Returns if `path` proves that `entry` is leaf `index` of the tree of `size` leaves with this root (section 2.1.3.2). */
export async function verifyInclusion(root, size, index, entry, path) {
  const text = `the proof does not show that entry ${index} is in the log of ${size} entries`;
  require(index < size, text, "log.inclusion");
  let [at, last, found] = [index, size - 1n, await digest(concat([0], entry))];
  for (const step of path) {
    require(last !== 0n, text, "log.inclusion");
    if (at & 1n || at === last) {
      found = await node(step, found);
      [at, last] = up(at, last);
    } else {
      found = await node(found, step);
    }
    [at, last] = [at >> 1n, last >> 1n];
  }
  require(last === 0n && equal(found, root), text, "log.inclusion");
}

/** Returns if `path` proves that the tree of `old` leaves is a prefix of that of `size` leaves (section 2.1.4.2). */
export async function verifyConsistency(oldRoot, old, root, size, path) {
  const text = `the proof does not show that the log of ${size} entries begins with the ${old} entries seen before`;
  const about = "log.consistency";
  require(0n < old && old <= size, text, about);
  if (old === size) return require(!path.length && equal(oldRoot, root), text, about);
  const [start, ...steps] = old & (old - 1n) ? path : [oldRoot, ...path];
  require(start, text, about);
  let [at, last] = [old - 1n, size - 1n];
  while (at & 1n) [at, last] = [at >> 1n, last >> 1n];
  let [first, second] = [start, start];
  for (const step of steps) {
    require(last !== 0n, text, about);
    if (at & 1n || at === last) {
      [first, second] = [await node(step, first), await node(step, second)];
      [at, last] = up(at, last);
    } else {
      second = await node(second, step);
    }
    [at, last] = [at >> 1n, last >> 1n];
  }
  require(last === 0n && equal(first, oldRoot) && equal(second, root), text, about);
}

/** The first node on the way up that is a right child, or the root. */
function up(at, last) {
  while (!(at & 1n) && at) [at, last] = [at >> 1n, last >> 1n];
  return [at, last];
}

function require(holds, text, about) {
  if (!holds) throw new TrustError(text, about);
}
