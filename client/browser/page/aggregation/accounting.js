// What sums with distributed noise reveal about one device, as aggregation/privacy/accounting.py: Rényi differential privacy, as
// a number (ε, δ), up to the rounding of floating point. And, as rounding.py, rounding to whole steps with a bound on the norm that
// holds for every input (conditional randomized rounding; Kairouz, Liu, Steinke 2021).

import { ConfigError, DataError } from "../errors.js";
import { DISCRETE_GAUSSIAN, SKELLAM } from "./noise.js";

const range = (first, end, step = 1) => Array.from({ length: Math.ceil((end - first) / step) }, (_, i) => first + i * step);
export const ORDERS = [...range(2, 64), ...range(64, 256, 8), ...range(256, 1024, 32), ...range(1024, 8193, 256)];
const DISTANCE = 2 ** -108; // statistical distance to the exact distribution that one drawn number may have
const RESERVE = 2 ** -10; // share of δ that is kept for it

/** What a number of sums reveal together: { curve, draws }. Their curves, in nats at each of `ORDERS`, add up. */
export const NOTHING = Object.freeze({ curve: Object.freeze(ORDERS.map(() => 0)), draws: 0 });

/** What one sum of one segment reveals: `norm_squared` is the largest squared L2 norm of one device's integers, `variance` that of the
 * noise of one device on one of `size` elements, `honest` how many devices' noise counts. Throws ConfigError: one is out of range. */
export function spentOn({ mechanism, ...sum }) {
  for (const [name, value] of Object.entries(sum)) {
    if (!(Number.isFinite(value) && value > 0)) throw new ConfigError(`${name} ${value} of a noisy sum is not above 0`, `sum.${name}`);
  }
  if (mechanism === DISCRETE_GAUSSIAN && sum.variance < 0.25) {
    throw new ConfigError(`discrete Gaussian noise of variance ${sum.variance} is below 1/4 squared steps: take finer steps`, "sum.variance");
  }
  return { curve: (mechanism === SKELLAM ? skellam : gaussian)(sum), draws: sum.honest * sum.size };
}

export const together = (left, right) => ({ curve: left.curve.map((each, i) => each + right.curve[i]), draws: left.draws + right.draws });

/** Agarwal et al. 2021, corollary 3.6. */
function skellam({ size, norm_squared: squared, variance, honest }) {
  const total = honest * variance;
  const first = Math.min(Math.sqrt(size) * Math.sqrt(squared), squared);
  const coarse = (3 * first) / (2 * total);
  return ORDERS.map((order) => {
    const fine = ((2 * order - 1) * squared + 6 * first) / (4 * total ** 2);
    return (order * squared) / (2 * total) + Math.min(fine, coarse);
  });
}

/** Kairouz et al. 2021, proposition 14. */
function gaussian({ size, norm_squared: squared, variance, honest }) {
  const [total, root] = [honest * variance, Math.sqrt(size)];
  const first = Math.min(root * Math.sqrt(squared), squared);
  let sum = 0;
  for (let n = honest; n >= 2; n--) sum += Math.exp(-2 * Math.PI ** 2 * variance * (1 - 1 / n)); // the small ones first
  const tau = 10 * sum;
  const middle = squared / total + (2 * tau * first) / Math.sqrt(total) + tau ** 2 * size;
  const wide = (Math.sqrt(squared / total) + tau * root) ** 2;
  return ORDERS.map((order) => Math.min((order * squared) / (2 * total) + tau * size, (order / 2) * Math.min(middle, wide)));
}

/** The least ε on `ORDERS` for which all of `spent` is (ε, δ)-differentially private (Canonne et al. 2020, proposition 12); infinite if
 * the distance of the drawn noise takes more of `delta` than is kept for it. */
export function epsilonOf({ curve, draws }, delta) {
  if (!curve.some(Boolean)) return 0;
  const rest = Math.log(delta * (1 - RESERVE));
  const found = curve.map((each, i) => each + Math.log1p(-1 / ORDERS[i]) - (rest + Math.log(ORDERS[i])) / (ORDERS[i] - 1));
  const least = Math.max(0, Math.min(...found));
  return least < 100 && (1 + Math.exp(least)) * draws * DISTANCE <= delta * RESERVE ? least : Infinity;
}

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

/** Rounds `steps`, a Float64Array of L2 norm `norm` at most, until the norm is within `normSquared`, which is compared in whole numbers.
 * `rounded` → Promise of the numbers, rounded by unbiased coins that are new in each call. Throws DataError: `steps` is longer, or not
 * finite. */
export async function roundWithin(steps, norm, rounded) {
  const length = Math.sqrt(steps.reduce((sum, x) => sum + x * x, 0));
  if (!(length <= norm * (1 + SLACK))) throw new DataError(`a vector of length ${length} steps is longer than its bound of ${norm}`, "norm");
  const longest = BigInt(normSquared(norm, steps.length));
  for (;;) {
    const found = await rounded();
    if (found.reduce((sum, x) => sum + BigInt(x) ** 2n, 0n) <= longest) return found;
  }
}
