// Optimizers, and training with them in a round and in a lesson, as client/training/descent.py and batches.py and client/learning/tune.py:
// equal gradients give equal adapters, up to rounding. The order of a device's examples is drawn from the browser's entropy: NumPy does
// not promise to keep the stream of its generator, from which a native device draws it.

import { DataError } from "../errors.js";

const [BETA_1, BETA_2, EPSILON] = [0.9, 0.999, 1e-8];
const DISTANCE = 1000; // in weight units: the farthest that training takes a number from its start
const { fround } = Math;
const LEARNING_RATE = 0.002; // of a correction
const SURE = 0.8; // probability of a correction's label at which it counts as learned
export const MAX_STEPS = 30; // of a lesson
const MAX_SECONDS = 60; // after which no further step begins

/** Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2). The moments are in double precision. */
export class AdamW {
  #steps = 0;
  #moments = new Map(); // name → [first, second]

  constructor(learningRate, weightDecay = 0) {
    Object.assign(this, { learningRate, weightDecay });
  }

  /** Change each parameter that has a gradient, in place. Both are Maps of name → Float32Array, of equal lengths. `factor`: of the
   * learning rate. */
  step(parameters, gradients, factor = 1) {
    this.#steps += 1;
    const [bias1, bias2] = [1 - BETA_1 ** this.#steps, 1 - BETA_2 ** this.#steps];
    const rate = factor * this.learningRate;
    const kept = fround(1 - rate * this.weightDecay);
    for (const [name, gradient] of gradients) {
      const values = parameters.get(name);
      const [first, second] = this.#momentsOf(name, gradient.length);
      gradient.forEach((g, i) => {
        first[i] = BETA_1 * first[i] + (1 - BETA_1) * g;
        second[i] = BETA_2 * second[i] + (1 - BETA_2) * g ** 2;
        const change = first[i] / bias1 / (Math.sqrt(second[i] / bias2) + EPSILON);
        values[i] = fround(values[i] * kept) - rate * change;
      });
    }
  }

  #momentsOf(name, size) {
    if (!this.#moments.has(name)) this.#moments.set(name, [new Float64Array(size), new Float64Array(size)]);
    return this.#moments.get(name);
  }
}

/** Stochastic gradient descent with momentum (Polyak 1964). */
export class SGD {
  #changes = new Map(); // name → the last change

  constructor(learningRate, momentum = 0) {
    Object.assign(this, { learningRate, momentum });
  }

  step(parameters, gradients, factor = 1) {
    const rate = factor * this.learningRate;
    for (const [name, gradient] of gradients) {
      const values = parameters.get(name);
      const before = this.#changes.get(name) ?? new Float64Array(gradient.length);
      const change = before.map((last, i) => gradient[i] + this.momentum * last);
      if (this.momentum) this.#changes.set(name, change);
      change.forEach((each, i) => (values[i] = values[i] - rate * each));
    }
  }
}

/** Minimize a loss over the parameters `trained`, a list of names. Returns all values, of which the others are as before.
 *
 * `start` is a Map of name → Float32Array, which stays as it is; `order` the batches of all epochs; `gradientsOf` values and batch →
 * Promise of { loss, gradients }; `task` of a plan (task.js). A gradient is clipped to `norm`. One that is not finite counts as zero if
 * `unfailing`, and no value gets farther than DISTANCE from its start, as in a round (client/training/descent.py says why); else it throws
 * a DataError. */
export async function descend(start, order, gradientsOf, task, trained, { norm = Infinity, unfailing = false } = {}) {
  const values = new Map([...start].map(([name, each]) => [name, each.slice()]));
  const { optimizer: kind, learning_rate: rate, weight_decay: decay } = task;
  const optimizer = kind === "sgd" ? new SGD(rate, task.momentum) : new AdamW(rate, decay);
  const limit = Math.min(task.gradient_norm || Infinity, norm);
  for (const [number, batch] of order.entries()) {
    const { loss, gradients: found } = await gradientsOf(values, batch);
    const isFinite = Number.isFinite(loss) && trained.every((name) => found.get(name).every(Number.isFinite));
    if (!isFinite && !unfailing) throw new DataError("the training loss is not finite; lower the learning rate", "training.loss");
    const gradients = trained.map((name) => [name, isFinite ? found.get(name) : new Float32Array(start.get(name).length)]);
    const regular = regularized(new Map(gradients), values, start, task);
    optimizer.step(values, clipped(regular, limit), schedule(task.schedule, number, order.length));
    if (unfailing) for (const name of trained) near(values.get(name), start.get(name));
  }
  return finite(values, "lower the learning rate");
}

function finite(values, remedy) {
  if ([...values.values()].every((each) => each.every(Number.isFinite))) return values;
  throw new DataError(`the trained adapter is not finite; ${remedy}`, "training.adapter");
}

/** Keep each value within DISTANCE of its start, in place. */
function near(values, start) {
  start.forEach((from, i) => (values[i] = Math.min(Math.max(values[i], fround(from - DISTANCE)), fround(from + DISTANCE))));
}

/** The factor of the learning rate at a step, from 0 on, of so many: constant, linear to 0, or half a period of a cosine. */
export function schedule(kind, number, steps) {
  if (kind === "linear") return 1 - number / steps;
  return kind === "cosine" ? 0.5 * (1 + Math.cos((Math.PI * number) / steps)) : 1;
}

/** With FedProx's term (Li et al. 2020) and the weight decay of SGD. */
function regularized(gradients, values, start, { optimizer, proximal, weight_decay: decay }) {
  const pull = fround(proximal);
  const shrink = optimizer === "sgd" ? fround(decay) : 0;
  if (!pull && !shrink) return gradients;
  return mapped(gradients, (name, i, g) => {
    const value = values.get(name)[i];
    return fround(g + fround(pull * fround(value - start.get(name)[i]))) + fround(shrink * value);
  });
}

/** Gradients whose L2 norm over all of them is at most `limit` (Pascanu et al. 2013). */
export function clipped(gradients, limit) {
  if (limit === Infinity) return gradients;
  const squares = [...gradients.values()].map((each) => each.reduce((sum, g) => sum + g * g, 0));
  const norm = Math.sqrt(squares.reduce((sum, each) => sum + each, 0));
  const factor = fround(Math.min(limit / (norm + 1e-6), 1));
  return mapped(gradients, (name, i, g) => g * factor);
}

const mapped = (gradients, change) =>
  new Map([...gradients].map(([name, each]) => [name, each.map((g, i) => change(name, i, g))]));

/** Train `start` on all examples at once, half of the loss being that of the corrections and half that of phrases to rehearse, until
 * each correction has its label with probability `SURE`: { values, steps }. `trainer` has `gradients` and `logits` of a
 * `GraphTrainer`. `taught` and `rehearsed` are [{ ids, target }], at least one taught. `pause` and errors are those of `descendUntil`. */
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
    if ((await isLearned(values, between)) || steps === MAX_STEPS || clock() >= end) return { values: finite(values, "teach other phrases"), steps };
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

/** The batches of all epochs, as lists of indices: texts of similar length, which need little padding, in random order. `lengths` are
 * tokens of each text; `permuted` draws an order, n → a permutation of 0 to n - 1. Guarantee: an epoch contains every index exactly
 * once. */
export function batches(lengths, size, epochs, permuted = permutation) {
  const epoch = () => {
    const grouped = permuted(lengths.length).sort((left, right) => lengths[left] - lengths[right]); // which is stable
    const all = Array.from({ length: Math.ceil(grouped.length / size) }, (_, i) => grouped.slice(i * size, (i + 1) * size));
    return permuted(all.length).map((i) => all[i]);
  };
  return Array.from({ length: epochs }, epoch).flat();
}

/** The texts of a batch, given by their lengths, in runs of at most `tokens` tokens with padding, each of one or more. */
export function parts(lengths, tokens) {
  const found = [];
  let longest = 0;
  for (const [i, length] of lengths.entries()) {
    longest = Math.max(longest, length);
    const run = found.at(-1);
    if (run && longest * (run.length + 1) <= tokens) {
      run.push(i);
    } else {
      found.push([i]);
      longest = length;
    }
  }
  return found;
}

/** A random permutation of 0 to n - 1 (Fisher and Yates), each as likely as any other. */
export function permutation(n) {
  const found = Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const other = below(i + 1);
    [found[i], found[other]] = [found[other], found[i]];
  }
  return found;
}

/** A random whole number below n, which is at most 2^32. */
function below(n) {
  const most = 2 ** 32 - (2 ** 32 % n);
  for (;;) {
    const [drawn] = crypto.getRandomValues(new Uint32Array(1));
    if (drawn < most) return drawn % n;
  }
}
