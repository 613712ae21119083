// Gradients of a language model's adapter from the training graph of its bundle, as client/training/languagegraph.py.

import { ConfigError, quoted } from "../errors.js";
import * as runtime from "../runtime.js";
import { parts } from "./batches.js";
import { SlotGraph, TOKENS_AT_ONCE } from "./slotgraph.js";

const MAX_LOSS = 20; // nats for each byte of a text (adapters/task.py)

export class LanguageGraphTrainer extends SlotGraph {
  static async open(engine, adapter) {
    const trainer = await super.open(engine, adapter);
    const { vocabulary } = engine.generation;
    const [row] = [...trainer.shapes].find(([, shape]) => shape.includes(vocabulary)) ?? [];
    if (row === undefined) return trainer;
    await trainer.close();
    const reason = `${quoted(row)} has a row for each token: an adapter of it would show which tokens the examples have`;
    throw new ConfigError(`${reason}; use one of other layers`, "target_modules");
  }

  /**
   * The sum of each example's mean cross-entropy a learned token, in nats, times its share, and the gradient by each value:
   * { loss, gradients, scores }. The scores, one for each example, are { bits, known }: bits for each byte of its answer, and
   * whether each learned token is the most likely one, so that without sampling it is the answer.
   *
   * `examples` are [{ ids, first, size, share }] (`encoded`). `pause` and errors are those of `summed`.
   */
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

function scores(run, { log_likelihood: nats, hits }) {
  let at = 0;
  return run.map((example) => {
    const [begin, end] = [at, (at += learned(example))];
    const loss = -nats.data.subarray(begin, end).reduce((sum, each) => sum + each, 0) / example.size;
    return { bits: Math.min(loss, MAX_LOSS) / Math.LN2, known: hits.data.subarray(begin, end).every(Boolean) };
  });
}
