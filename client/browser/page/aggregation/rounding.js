// Rounding to whole steps with a bound on the norm that holds for every input, as aggregation/privacy/rounding.py (conditional
// randomized rounding; Kairouz, Liu, Steinke 2021).

import { ConfigError, DataError } from "../errors.js";

const REPEATED = 3.7233; // √(2 log 1/β) for the probability β = 2^-10 that a rounding is repeated, rounded up
const SLACK = 2 ** -20; // relative, of a norm in floating point
const LONGEST = 2 ** 30; // steps

/** The largest squared L2 norm, in squared steps, of a rounded vector of norm `norm` and `size` numbers. Throws ConfigError. */
export function normSquared(norm, size) {
  if (!(0 < norm && norm <= LONGEST)) throw new ConfigError(`a norm of ${norm} steps is not between 0 and 2^30`, "norm");
  const root = Math.sqrt(size);
  const expected = norm ** 2 + size / 4 + REPEATED * (norm + root / 2);
  return Math.floor(Math.min(expected, (norm + root) ** 2));
}

/**
 * Rounds `steps`, a Float64Array of L2 norm `norm` at most, until the norm is within `normSquared`, which is compared in whole
 * numbers. `rounded` → Promise of the numbers, rounded by unbiased coins that are new in each call. Throws DataError: `steps` is
 * longer, or not finite.
 */
export async function roundWithin(steps, norm, rounded) {
  const length = Math.sqrt(steps.reduce((sum, x) => sum + x * x, 0));
  if (!(length <= norm * (1 + SLACK))) throw new DataError(`a vector of length ${length} steps is longer than its bound of ${norm}`, "norm");
  const longest = BigInt(normSquared(norm, steps.length));
  for (;;) {
    const found = await rounded();
    if (found.reduce((sum, x) => sum + BigInt(x) ** 2n, 0n) <= longest) return found;
  }
}
