// Samples the next token from the logits.

import { DataError } from "./errors.js";

/** The id of the next token. With `temperature` 0 it is the token with the highest logit (the first of equals). Otherwise it is drawn
 * from softmax(logits / temperature), restricted to the smallest set of most likely tokens with the probability `topP` (nucleus
 * sampling, Holtzman et al. 2020); `random` returns numbers in [0, 1). Throws DataError: a logit is not finite. */
export function sample(logits, { temperature, topP, random }) {
  let top = 0;
  for (let i = 0; i < logits.length; i++) {
    if (!Number.isFinite(logits[i])) throw new DataError("the answer is not finite; use another adapter", "logits");
    if (logits[i] > logits[top]) top = i;
  }
  return temperature > 0 ? draw(logits, logits[top], { temperature, topP, random }) : top;
}

function draw(logits, highest, { temperature, topP, random }) {
  const weights = Float64Array.from(logits, (logit) => Math.exp((logit - highest) / temperature));
  const order = Uint32Array.from(weights, (_, i) => i).sort((a, b) => weights[b] - weights[a] || a - b);
  const total = weights.reduce((a, b) => a + b, 0);
  let [kept, mass] = [0, 0];
  while (kept < order.length && (kept === 0 || mass < topP * total)) mass += weights[order[kept++]];
  let left = random() * mass;
  for (let i = 0; i < kept; i++) if ((left -= weights[order[i]]) < 0) return order[i];
  return order[kept - 1];
}

/** A function that returns numbers in [0, 1), from a 32-bit seed (mulberry32): equal seeds give equal texts. */
export function seeded(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
