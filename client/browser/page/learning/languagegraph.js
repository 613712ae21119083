// Gradients of a language model's adapter from the training graph of its bundle, as client/training/languagegraph.py.

import { ConfigError, quoted } from "../errors.js";
import { fixedTexts } from "../provider.js";
import * as runtime from "../runtime.js";
import { parts } from "./batches.js";
import { encoded } from "./encoding.js";
import { SlotGraph, TOKENS_AT_ONCE } from "./slotgraph.js";

const MAX_LOSS = 20; // nats for each byte of a text (edgeadapt/rounds/task.py)

export class LanguageGraphTrainer extends SlotGraph {
  static scores = ["log_likelihood", "hits"];

  static async open(engine, adapter, start) {
    const trainer = await super.open(engine, adapter, start);
    const { vocabulary } = engine.generation;
    const [row] = [...trainer.shapes].find(([, shape]) => shape.includes(vocabulary)) ?? [];
    if (row === undefined) return trainer;
    await trainer.close();
    const reason = `${quoted(row)} has a row for each token: an adapter of it would show which tokens the examples have`;
    throw new ConfigError(`${reason}; use one of other layers`, "target_modules");
  }

  encode(example) {
    return encoded(example, this.engine.generation);
  }

  /** A batch with its factors in the loss, which is the mean of its learned tokens. */
  shares(batch) {
    const total = batch.reduce((sum, example) => sum + learned(example), 0);
    return batch.map((example) => ({ ...example, share: learned(example) / total }));
  }

  /** The score of values on examples: { correct, loss, count }, the sums of the share of learned tokens that are the most likely ones,
   * and of nats for each byte. `pause` as in `gradients`. */
  async score(values, examples, pause) {
    const { scores } = await this.gradients(values, examples.map((one) => ({ ...one, share: 0 })), pause);
    const sum = (of) => scores.reduce((total, each) => total + of(each), 0);
    return { correct: sum(({ hits }) => hits), loss: sum(({ nats }) => nats), count: examples.length };
  }

  probes() {
    return fixedTexts(this.engine.generation).map((ids) => ({ ids, first: 2, size: ids.length - 2, share: 0.5 }));
  }

  /** The sum of each example's mean cross-entropy a learned token, in nats, times its share, and the gradient by each value: { loss,
   * gradients, scores }. The scores, one for each example, are { nats, hits, least }: nats for each byte, the share of learned tokens that
   * are the most likely ones, with 1 the text is the answer without sampling, and the lowest probability of a learned token.
   *
   * `examples` are [{ ids, first, size, share }] (`encoded`). `pause` and errors are those of `summed`. */
  async gradients(values, examples, pause) {
    const runs = parts(examples.map(({ ids }) => ids.length), TOKENS_AT_ONCE).map((run) => run.map((i) => examples[i]));
    const { loss, gradients, outputs } = await this.summed(values, runs.map(batchOf), pause);
    return { loss, gradients, scores: runs.flatMap((run, i) => scores(run, outputs[i])) };
  }
}

const learned = ({ ids, first }) => ids.length - first;

/** The graph inputs of examples. A position is the place, in all rows, of the token before one that is learned. */
function batchOf(run) {
  const tokens = runtime.padded(run.map(({ ids }) => ids));
  const longest = tokens.input_ids.dims[1];
  const places = (example, row) => Array.from({ length: learned(example) }, (_, i) => row * longest + example.first - 1 + i);
  const targets = run.flatMap(({ ids, first }) => ids.slice(first));
  const shares = run.flatMap((example) => new Array(learned(example)).fill(example.share / learned(example)));
  const shape = [targets.length];
  return {
    ...tokens,
    positions: runtime.int64(run.flatMap(places), shape),
    targets: runtime.int64(targets, shape),
    shares: runtime.floats(Float32Array.from(shares), shape),
  };
}

function scores(run, { log_likelihood: likelihood, hits }) {
  let at = 0;
  return run.map((example) => {
    const [begin, end] = [at, (at += learned(example))];
    const sum = (values) => values.subarray(begin, end).reduce((total, each) => total + each, 0);
    const nats = Math.min(-sum(likelihood.data) / example.size, MAX_LOSS);
    const least = Math.exp(Math.min(...likelihood.data.subarray(begin, end)));
    return { nats, hits: sum(hits.data) / learned(example), least };
  });
}
