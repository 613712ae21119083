// Gradients of a language model's adapter from the training graph of its bundle, and its examples as tokens, as
// client/training/languagegraph.py and encoding.py.

import { encode } from "../bytes.js";
import { ConfigError, DataError, quoted } from "../errors.js";
import * as runtime from "../runtime.js";
import { parts } from "./descent.js";
import { SlotGraph, TOKENS_AT_ONCE } from "./slotgraph.js";

const MAX_LOSS = 20; // nats for each byte of a text (edgeadapt/rounds/task.py)
const MAX_TOKENS = 128; // of a prompt with its text

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
    return runtime.fixedTexts(this.engine.generation).map((ids) => ({ ids, first: 2, size: ids.length - 2, share: 0.5 }));
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

/** A text as tokens, or a prompt and the text that answers it, in the model's chat template if it has one: { ids, first, size, cut }.
 * Learned are the tokens from place `first` on: all but the first one, or those of an answer. `size`: the bytes that they stand for, at
 * least 1; `cut`: whether the text has more tokens than are learned.
 *
 * Throws ConfigError: the chat template does not begin an answer with its prompt. DataError: the prompt leaves no room, or there is a
 * special token, which could pose as another message. */
export function encoded({ text, prompt = "" }, { text: tokenizer, chat, limit, ends }) {
  for (const each of [prompt, text]) tokenizer.requirePlain(each, "text");
  const [before, after] = rendered(text, prompt, chat);
  const [asked, own] = [before ? tokenizer.formatted(before) : [], tokenizer.formatted(text)];
  const closing = after ? tokenizer.formatted(after) : [ends.values().next().value];
  const ids = [...asked, ...own, ...closing];
  const [first, longest] = [Math.max(asked.length, 1), Math.min(MAX_TOKENS, limit)];
  if (ids.length <= first || first >= longest) {
    throw new DataError(`the prompt leaves no room for its text within ${longest} tokens: shorten it`, "text");
  }
  const bytes = (tokens) => (tokens.length ? encode(tokenizer.decoded(tokens)).length : 0);
  const kept = longest - asked.length;
  const end = kept < own.length ? bytes(own.slice(0, kept)) : encode(text).length;
  const size = Math.max(end - bytes(own.slice(0, first - asked.length)), 1);
  return { ids: ids.slice(0, longest), first, size, cut: ids.length > longest };
}

/** What comes before a text, and what closes it: nothing without a template. */
function rendered(text, prompt, chat) {
  if (!prompt || !chat) return [prompt, ""];
  const asked = { role: "user", content: prompt };
  const before = chat([asked]);
  const whole = chat([asked, { role: "assistant", content: text }], false);
  if (whole.startsWith(before + text)) return [before, whole.slice(before.length + text.length)];
  throw new ConfigError("the base's chat template changes a prompt or a text", "chat_template");
}
