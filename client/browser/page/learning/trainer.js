// Gradients and logits of a classifier's adapter from the graphs of its bundle, as client/training/graphtrainer.py.

import { byCodePoint } from "../bytes.js";
import { ConfigError, quoted } from "../errors.js";
import { isHead } from "../graphinputs.js";
import * as runtime from "../runtime.js";
import { parts } from "./descent.js";
import { SlotGraph, TOKENS_AT_ONCE } from "./slotgraph.js";

const ENCODER = "encoder."; // begins the path of everything below the head
const MEAN_HEAD = ["classifier.bias", "classifier.weight"]; // over the mean of the tokens, as federations train it
const MAX_TOKENS = 128; // of a text
const MAX_LOSS = 20; // nats, of one example (edgeadapt/rounds/task.py)
const MAX_ROWS = 16; // of one run of the answering graph

/** Refuse a base with another head than one over the mean of the tokens, or with virtual tokens: federations train such a head, and it
 * alone has embeddings. Throws ConfigError. */
export function requireMeanHead({ slots }) {
  const isOdd = (name) => (isHead(name) ? !MEAN_HEAD.includes(name) : !name.startsWith(ENCODER));
  const odd = [...Object.keys(slots).filter(isOdd), ...MEAN_HEAD.filter((name) => !Object.hasOwn(slots, name))];
  if (!odd.length) return;
  const [first] = odd.sort(byCodePoint);
  const remedy = "export it with --head mean, without virtual tokens";
  throw new ConfigError(`the base has a slot ${quoted(first)}, which is not of a head over the mean of the tokens: ${remedy}`, first);
}

export class GraphTrainer extends SlotGraph {
  static head({ slots }) {
    return Object.keys(slots).filter(isHead);
  }

  /** As `open`, without the training graph: what answers and embeds, and has no gradients. Throws as `open`. */
  static answering(engine, adapter) {
    const { scaling, shapes } = this.checked(engine.base, adapter);
    return new this(engine, null, shapes, scaling);
  }

  probes() {
    return runtime.fixedTexts(this.engine.text).map((ids) => ({ ids, target: 0, share: 0.5 }));
  }

  tokens(text) {
    return this.engine.text.tokens(text, MAX_TOKENS);
  }

  /** How many tokens at the end of a text are not trained on. Throws as `tokens`. */
  unread(text) {
    return this.engine.text.unread(text, 0, MAX_TOKENS);
  }

  /** Those of examples, [{ text }], that the model reads as other tokens than each of `others`, and than each before. Throws as `tokens`. */
  unlike(examples, others) {
    const read = new Set(others.map(({ text }) => this.tokens(text).join()));
    return examples.filter(({ text }) => {
      const ids = this.tokens(text).join();
      return !read.has(ids) && read.add(ids);
    });
  }

  encode({ text }) {
    return { ids: this.tokens(text) };
  }

  /** A batch with its factors in the loss, which is the mean of its examples. */
  shares(batch) {
    return batch.map((example) => ({ ...example, share: 1 / batch.length }));
  }

  /** The score of values on examples with a target: { correct, loss, count }, the loss in nats. `pause` as in `gradients`. */
  async score(values, examples, pause) {
    const logits = await this.logits(values, examples.map(({ ids }) => ids), pause);
    const sum = (of) => examples.reduce((total, { target }, i) => total + of(Float64Array.from(logits[i]), target), 0);
    const isBest = (row, target) => Number(row.indexOf(Math.max(...row)) === target);
    return { correct: sum(isBest), loss: sum(crossEntropy), count: examples.length };
  }

  /** The sum of each example's cross-entropy in nats times its share, and the gradient by each value: { loss, gradients }.
   *
   * `examples` are [{ ids, target, share }]: tokens, the number of the label, and the factor in the loss. `pause` and errors are those of
   * `summed`. */
  gradients(values, examples, pause) {
    const ordered = byLength(examples);
    const runs = parts(ordered.map(({ ids }) => ids.length), TOKENS_AT_ONCE).map((run) => run.map((i) => ordered[i]));
    const batches = runs.map((run) => ({ ...runtime.padded(run.map(({ ids }) => ids)), ...targets(run) }));
    return this.summed(values, batches, pause);
  }

  /** The logits of texts, given as tokens: a Float32Array for each. `pause` as in `gradients`. */
  async logits(values, tokens, pause) {
    return this.#answers(await this.inputsOf(values), tokens, pause);
  }

  /** The embeddings of texts, as `logits`: the logits of a head that is the identity. */
  async embeddings(values, tokens, pause) {
    const inputs = await this.inputsOf(values);
    const [bias, weight] = MEAN_HEAD;
    const { hidden } = this;
    const identity = Float32Array.from({ length: hidden ** 2 }, (_, i) => Number(i % (hidden + 1) === 0));
    inputs.set(bias, { shape: [hidden], values: new Float32Array(hidden) });
    return this.#answers(inputs.set(weight, { shape: [hidden, hidden], values: identity }), tokens, pause);
  }

  get hidden() {
    const [bias, weight] = MEAN_HEAD.map((name) => this.shapes.get(name).reduce((product, size) => product * size, 1));
    return weight / bias;
  }

  /** The head among values: { weight, bias }, as many rows of `hidden` numbers as labels. */
  head(values) {
    const [bias, weight] = MEAN_HEAD.map((name) => values.get(name));
    return { weight, bias };
  }

  async #answers(inputs, tokens, pause) {
    const feeds = runtime.adapterFeeds(inputs);
    const order = byLength(tokens.map((ids, at) => ({ ids, at })));
    const rows = this.engine.base.independent_rows ? MAX_ROWS : 1;
    const found = [];
    for (let start = 0; start < order.length; start += rows) {
      await pause();
      const run = order.slice(start, start + rows);
      const { logits } = await runtime.run(this.engine.session, { ...runtime.padded(run.map(({ ids }) => ids)), ...feeds });
      const width = logits.dims[1];
      run.forEach(({ at }, i) => (found[at] = logits.data.slice(i * width, (i + 1) * width)));
    }
    return found;
  }
}

function crossEntropy(logits, target) {
  const largest = Math.max(...logits);
  const sum = logits.reduce((total, each) => total + Math.exp(each - largest), 0);
  return Math.min(MAX_LOSS, Math.log(sum) - (logits[target] - largest));
}

const byLength = (examples) => examples.toSorted((left, right) => left.ids.length - right.ids.length);

const targets = (run) => ({
  targets: runtime.int64(run.map(({ target }) => target), [run.length]),
  shares: runtime.floats(Float32Array.from(run, ({ share }) => share), [run.length]),
});
