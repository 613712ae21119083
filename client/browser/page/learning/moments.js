// What a device's own examples contribute to an analytic head, as edgeadapt/rounds/ridge.py and edgeadapt/rounds/analytic.py: their
// moments; or in a session with noise, what the head on offer gets wrong.

import { DataError } from "../errors.js";

const EVEN = 0.3; // share of the spread of texts that the head on offer does not show
const FLOOR = 0.003; // added to it

/** The moments of examples: { xx, xy, count }. `embeddings` are rows of d numbers, scaled to L2 norm 1 here, where a row of zeros stays
 * one; `labels` their numbers, below `k`. `xx` is the upper triangle of Σ x xᵀ, row by row, and `xy` is Σ x yᵀ of d rows and k columns;
 * both Float64Array, no number above the count of examples. Throws DataError: a number is not finite. */
export function momentsOf(embeddings, labels, d, k) {
  const rows = embeddings.map(unit);
  const [xx, xy] = [new Float64Array((d * (d + 1)) / 2), new Float64Array(d * k)];
  rows.forEach((x, example) => {
    for (let i = 0, at = 0; i < d; i++) {
      for (let j = i; j < d; j++) xx[at++] += x[i] * x[j];
      xy[i * k + labels[example]] += x[i];
    }
  });
  const count = rows.length;
  const clipped = (values) => values.map((x) => Math.min(count, Math.max(-count, x))); // a sum of equal rows could be past it
  return { xx: clipped(xx), xy: clipped(xy), count };
}

/** What the head on offer gets wrong, before it is clipped: the mean over examples of z (y - p)ᵀ, Float64Array of d rows and k columns,
 * zeros without examples. `weight` has k rows of d numbers and `bias` k numbers; the rest and errors as of `momentsOf`. */
export function corrections(embeddings, labels, { weight, bias }) {
  const k = bias.length;
  const d = weight.length / k;
  const mean = new Float64Array(d * k);
  embeddings.map(unit).forEach((x, example) => {
    const wrong = likely(Float64Array.from(bias, (b, label) => b + dot(x, weight, label * d))).map((p) => -p);
    wrong[labels[example]] += 1;
    for (let i = 0; i < d; i++) for (let label = 0; label < k; label++) mean[i * k + label] += (x[i] * wrong[label]) / labels.length;
  });
  return forward(whitening(weight, d, k), mean, d, k);
}

/** The lower triangle L, row by row, with L Lᵀ = Σ + FLOOR · I, where Σ is how texts are spread, as a head of `k` rows shows it. */
function whitening(weight, d, k) {
  const left = new Float64Array(d * d);
  for (let label = 0; label < k; label++) {
    const row = weight.subarray(label * d, (label + 1) * d);
    const length = Math.hypot(...row) || 1;
    for (let i = 0; i < d; i++) {
      const factor = ((1 - EVEN) / k) * (row[i] / length);
      for (let j = 0; j <= i; j++) left[i * d + j] += factor * (row[j] / length);
    }
  }
  for (let i = 0; i < d; i++) left[i * d + i] += EVEN / d + FLOOR;
  for (let i = 0; i < d; i++) {
    for (let j = 0; j <= i; j++) {
      let rest = left[i * d + j];
      for (let at = 0; at < j; at++) rest -= left[i * d + at] * left[j * d + at];
      left[i * d + j] = i === j ? Math.sqrt(rest) : rest / left[j * d + j];
    }
  }
  if (!left.every(Number.isFinite)) throw new DataError("the head on offer shows no spread of texts", "classifier.weight");
  return left;
}

/** Z with L Z = right, d rows and k columns. */
function forward(lower, right, d, k) {
  const left = right.slice();
  for (let i = 0; i < d; i++) {
    for (let at = 0; at < i; at++) {
      const factor = lower[i * d + at];
      for (let label = 0; label < k; label++) left[i * k + label] -= factor * left[at * k + label];
    }
    for (let label = 0; label < k; label++) left[i * k + label] /= lower[i * d + i];
  }
  return left;
}

function dot(x, values, from) {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * values[from + i];
  return sum;
}

function likely(logits) {
  const most = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

function unit(row) {
  const values = Float64Array.from(row);
  const length = Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));
  if (!Number.isFinite(length)) throw new DataError("an embedding is not finite: the base or its adapter overflows", "embeddings");
  return length ? values.map((x) => x / length) : values;
}
