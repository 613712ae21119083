// The moments of a device's own examples, which it contributes to an analytic head, as adapters/ridge.py.

import { DataError } from "../errors.js";

/**
 * The moments of examples: { xx, xy, count }.
 *
 * `embeddings` are rows of d numbers, scaled to L2 norm 1 here, where a row of zeros stays one; `labels` their numbers, below
 * `k`. `xx` is the upper triangle of Σ x xᵀ, row by row, and `xy` is Σ x yᵀ of d rows and k columns; both Float64Array, no
 * number above the count of examples. Throws DataError: a number is not finite.
 */
export function momentsOf(embeddings, labels, d, k) {
  const [xx, xy] = [new Float64Array((d * (d + 1)) / 2), new Float64Array(d * k)];
  embeddings.forEach((row, example) => {
    const x = unit(row);
    for (let i = 0, at = 0; i < d; i++) {
      for (let j = i; j < d; j++) xx[at++] += x[i] * x[j];
      xy[i * k + labels[example]] += x[i];
    }
  });
  const count = embeddings.length;
  const clipped = (values) => values.map((x) => Math.min(count, Math.max(-count, x))); // a sum of equal rows could be past it
  return { xx: clipped(xx), xy: clipped(xy), count };
}

function unit(row) {
  const values = Float64Array.from(row);
  const length = Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));
  if (!Number.isFinite(length)) throw new DataError("an embedding is not finite: the base or its adapter overflows", "embeddings");
  return length ? values.map((x) => x / length) : values;
}
