// From scores to the next token: the most likely one, or one drawn from the likeliest.

import { DataError } from "./errors.js";

/**
 * The id of the next token.
 *
 * `temperature` 0 takes the highest score (the first of equals). Above, one is drawn from softmax(scores /
 * temperature) cut to the smallest set of likeliest tokens that together have `topP`; `random` gives [0, 1).
 *
 * Throws DataError: a score is not finite.
 */
export function choose(scores, { temperature, topP, random }) {
  let top = 0;
  for (let i = 0; i < scores.length; i++) {
    if (!Number.isFinite(scores[i])) throw new DataError("the model gave scores that are not finite; use another adapter");
    if (scores[i] > scores[top]) top = i;
  }
  return temperature > 0 ? draw(scores, scores[top], { temperature, topP, random }) : top;
}

function draw(scores, highest, { temperature, topP, random }) {
  const weights = Float64Array.from(scores, (score) => Math.exp((score - highest) / temperature));
  const order = Uint32Array.from(weights, (_, i) => i).sort((a, b) => weights[b] - weights[a] || a - b);
  const total = weights.reduce((a, b) => a + b, 0);
  let [kept, mass] = [0, 0];
  while (kept < order.length && (kept === 0 || mass < topP * total)) mass += weights[order[kept++]];
  let left = random() * mass;
  for (let i = 0; i < kept; i++) if ((left -= weights[order[i]]) < 0) return order[i];
  return order[kept - 1];
}

/** Numbers in [0, 1) from a 32-bit seed (mulberry32): the same seed gives the same text. */
export function seeded(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
