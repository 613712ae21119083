// The few steps of training that learn corrections, as client/learning/tune.py: half of the loss is that of the
// corrections, half that of phrases to rehearse, until each correction is answered as taught.

import { DataError } from "../errors.js";
import { AdamW } from "./descent.js";

const LEARNING_RATE = 0.002;
const SURE = 0.8; // probability of a correction's label at which it counts as learned
export const MAX_STEPS = 30;
const MAX_SECONDS = 60; // after which no further step begins

/** Train `start` on all examples at once, until each correction has its label with probability `SURE`: { values, steps }. `trainer` has
 * `gradients` and `logits` of a `GraphTrainer`. `taught` and `rehearsed` are [{ ids, target }], at least one taught. `pause` and errors
 * are those of `descendUntil`. */
export function tune(trainer, start, taught, rehearsed, pause, clock) {
  const examples = withShares(taught, rehearsed);
  const isLearned = async (values, between) => {
    const found = await trainer.logits(values, taught.map(({ ids }) => ids), between);
    return taught.every(({ target }, i) => probabilities(found[i], 1)[target] >= SURE);
  };
  const gradientsOf = (values, between) => trainer.gradients(values, examples, between);
  return descendUntil(isLearned, gradientsOf, start, LEARNING_RATE, pause, clock);
}

/** Examples with their factors in the loss: half of it is that of the corrections. */
export function withShares(taught, rehearsed) {
  const half = rehearsed.length ? 0.5 : 1;
  return [taught, rehearsed].flatMap((group) => group.map((one) => ({ ...one, share: half / group.length })));
}

/** Train `start` at a learning rate until `isLearned`, `MAX_STEPS` or `MAX_SECONDS`: { values, steps }.
 *
 * Of values and a pause between runs, `isLearned` gives whether they are learned, and `gradientsOf`, which is called after it with the same
 * ones, { loss, gradients }. `pause` is awaited between the parts of the work, with the number of steps so far; what it throws ends the
 * training. Throws DataError: the loss or the adapter is not finite, or the training graph does not run. */
export async function descendUntil(isLearned, gradientsOf, start, rate, pause, clock = () => performance.now() / 1000) {
  const values = new Map([...start].map(([name, each]) => [name, each.slice()]));
  const [optimizer, end] = [new AdamW(rate), clock() + MAX_SECONDS];
  for (let steps = 0; ; steps++) {
    const between = () => pause(steps);
    if ((await isLearned(values, between)) || steps === MAX_STEPS || clock() >= end) return { values: finite(values), steps };
    const { loss, gradients } = await gradientsOf(values, between);
    if (!Number.isFinite(loss)) {
      const reason = "the training loss is not finite: the base or the adapter in use is damaged; copy the bundle again";
      throw new DataError(reason, "training.loss");
    }
    optimizer.step(values, gradients);
  }
}

/** The softmax of logits that are divided by `temperature`. */
export function probabilities(logits, temperature) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const exponentials = Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  return exponentials.map((value) => value / sum);
}

function finite(values) {
  if ([...values.values()].every((each) => each.every(Number.isFinite))) return values;
  throw new DataError("the trained adapter is not finite: teach other phrases", "training.adapter");
}
