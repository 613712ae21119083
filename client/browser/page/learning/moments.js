// The moments of a device's own examples, which it contributes to an analytic head, as edgeadapt/rounds/ridge.py and edgeadapt/rounds/analytic.py.

import { rotate, seedOf } from "../aggregation/rotation.js";
import { unhex } from "../bytes.js";
import { DataError } from "../errors.js";

/** The moments of examples: { xx, xy, count }. `embeddings` are rows of d numbers, scaled to L2 norm 1 here, where a row of zeros stays
 * one; `labels` their numbers, below `k`. `xx` is the upper triangle of Σ x xᵀ, row by row, and `xy` is Σ x yᵀ of d rows and k columns;
 * both Float64Array, no number above the count of examples. Throws DataError: a number is not finite. */
export const momentsOf = (embeddings, labels, d, k) => momentsOfRows(embeddings.map(unit), labels, d, k);

/** The mean moments of examples in a session with noise, before they are clipped: those of the first `kept` coordinates of rotated
 * embeddings, the entries of Σ x xᵀ off the diagonal times √2; zeros without examples. `adapter`: the digest of its file, hex; the rest
 * and errors as of `momentsOf`. */
export async function projectedMoments(embeddings, labels, kept, k, adapter) {
  const seed = await seedOf(unhex(adapter));
  const rows = [];
  for (const row of embeddings) rows.push((await rotate(unit(row), seed)).subarray(0, kept));
  const { xx, xy, count } = momentsOfRows(rows, labels, kept, k);
  for (let i = 0, at = 0; i < kept; i++) {
    at++; // the diagonal
    for (let j = i + 1; j < kept; j++) xx[at++] *= Math.SQRT2;
  }
  return Float64Array.from([...xx, ...xy], (x) => (count ? x / count : x));
}

function momentsOfRows(rows, labels, d, k) {
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

function unit(row) {
  const values = Float64Array.from(row);
  const length = Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));
  if (!Number.isFinite(length)) throw new DataError("an embedding is not finite: the base or its adapter overflows", "embeddings");
  return length ? values.map((x) => x / length) : values;
}
