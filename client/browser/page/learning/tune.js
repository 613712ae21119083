// The few steps of training that learn corrections, as client/learning/tune.py: half of the loss is that of the
// corrections, half that of phrases to rehearse, until each correction is answered as taught.

import { DataError } from "../errors.js";
import { AdamW } from "./descent.js";

const LEARNING_RATE = 0.002;
const SURE = 0.8; // probability of a correction's label at which it counts as learned
export const MAX_STEPS = 30;
const MAX_SECONDS = 60; // after which no further step begins

/**
 * Train `start` on all examples at once: { values, steps }.
 *
 * `trainer` has `gradients` and `logits` of a `GraphTrainer`. `taught` and `rehearsed` are [{ ids, target }], at least one
 * taught. `pause` is awaited between the parts of the work, with the number of steps so far; what it throws ends the
 * training. Throws DataError: the loss or the adapter is not finite, or the training graph does not run.
 */
export async function tune(trainer, start, taught, rehearsed, pause, clock = () => performance.now() / 1000) {
  const half = rehearsed.length ? 0.5 : 1;
  const examples = [taught, rehearsed].flatMap((group) => group.map((one) => ({ ...one, share: half / group.length })));
  const values = new Map([...start].map(([name, each]) => [name, each.slice()]));
  const [optimizer, end] = [new AdamW(LEARNING_RATE), clock() + MAX_SECONDS];
  for (let steps = 0; ; steps++) {
    const between = () => pause(steps);
    const over = steps === MAX_STEPS || clock() >= end;
    if (over || (await learned(trainer, values, taught, between))) return { values: finite(values), steps };
    const { loss, gradients } = await trainer.gradients(values, examples, between);
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

async function learned(trainer, values, taught, pause) {
  const found = await trainer.logits(values, taught.map(({ ids }) => ids), pause);
  return taught.every(({ target }, i) => probabilities(found[i], 1)[target] >= SURE);
}

function finite(values) {
  if ([...values.values()].every((each) => each.every(Number.isFinite))) return values;
  throw new DataError("the trained adapter is not finite: teach other phrases", "training.adapter");
}
