// What a language model learns from corrections, and what it forgets, as client/learning/language.py.

import { DataError } from "../errors.js";
import { descendUntil, parts, withShares } from "./descent.js";
import { LanguageGraphTrainer, encoded } from "./languagegraph.js";
import { TOKENS_AT_ONCE } from "./slotgraph.js";

const LIKELY = 0.5; // probability of each token of an answer at which training ends: the answering graph rounds otherwise
const LEARNING_RATE = 0.005; // of a correction, whose few steps have to change several tokens
const MAX_REHEARSED = 32; // earlier corrections

/** Tune an adapter of an open bundle until it answers prompts as taught: corrections are [{ text, label }], where `label` is the answer to
 * the prompt `text`; `earlier`, those of other lessons, the oldest first, are rehearsed. Nothing is learned of the texts `compared`, [{
 * text, prompt }].
 *
 * Returns { inputs, steps, seconds, known, taught, others, compared }: the adapter's graph inputs; how many corrections are learned; the
 * corrections and the earlier ones, each { text, label, before, after }; and the texts that are compared, each { text, prompt, before,
 * after }, or null if nothing was learned or `pause` ended the comparison. `before` and `after` are bits for each byte: of the answer, or
 * of the text. `pause` and errors are those of `Learner.teach`. */
export async function teachLanguageModel(engine, adapter, corrections, earlier, pause, compared = []) {
  for (const one of corrections) [one.text, one.label].forEach((message) => engine.text.message(message));
  const prompts = new Set(corrections.map((one) => one.text));
  const rehearsed = earlier.filter((one) => !prompts.has(one.text)).reverse().slice(0, MAX_REHEARSED);
  const example = (one) => ({ ...one, ...encoded({ prompt: one.text, text: one.label }, engine.generation) });
  const examples = withShares(corrections.map(example), rehearsed.map(example));
  if (examples.slice(0, corrections.length).some(({ cut }) => cut)) {
    throw new DataError("the answer has more tokens than can be learned: teach a shorter one", "label");
  }
  const read = compared.map((one, i) => ({ ...one, ...readable(one, i + 1, engine.generation), share: 0 }));
  const trainer = await LanguageGraphTrainer.open(engine, adapter);
  try {
    return await lesson(trainer, adapter, examples, corrections.length, read, pause);
  } finally {
    await trainer.close();
  }
}

async function lesson(trainer, { inputs }, examples, count, compared, pause) {
  const [start, begun] = [await trainer.valuesOf(inputs), performance.now()];
  let before, found;
  const isLearned = async (values, between) => {
    found = await trainer.gradients(values, examples, between); // a run that gives gradients also says what is answered
    before ??= found.scores;
    return found.scores.slice(0, count).every(({ least }) => least >= LIKELY);
  };
  const { values, steps } = await descendUntil(isLearned, () => found, start, LEARNING_RATE, pause);
  const seconds = (performance.now() - begun) / 1000;
  const after = found.scores;
  const bits = ({ text, label }, i) => ({ text, label, before: cost(before[i]), after: cost(after[i]) });
  const all = examples.map(bits);
  const known = after.slice(0, count).filter(isKnown).length;
  const rest = known ? await comparison(trainer, compared, [start, values], (done) => pause(steps, done)) : null;
  return { inputs: await trainer.inputsOf(values), steps, seconds, known, taught: all.slice(0, count), others: all.slice(count), compared: rest };
}

/** What texts cost before and after a lesson; null if `pause`, which is called with { part, of }, throws. */
async function comparison(trainer, texts, adapters, pause) {
  const of = adapters.length * parts(texts.map(({ ids }) => ids.length), TOKENS_AT_ONCE).length;
  let [part, ended] = [0, false];
  const between = async () => {
    try {
      await pause({ part: ++part, of });
    } catch (error) {
      ended = true;
      throw error;
    }
  };
  try {
    const found = [];
    for (const values of texts.length ? adapters : []) found.push((await trainer.gradients(values, texts, between)).scores);
    const [before, after] = found;
    return texts.map(({ text, prompt }, i) => ({ text, prompt, before: cost(before[i]), after: cost(after[i]) }));
  } catch (error) {
    if (ended) return null;
    throw error;
  }
}

/** A text to compare as tokens. Throws as `encoded`, with the number of the text. */
function readable(text, number, generation) {
  try {
    return encoded(text, generation);
  } catch (error) {
    throw error instanceof DataError ? new DataError(`text ${number} to compare: ${error.message}`, "compared") : error;
  }
}

const cost = ({ nats }) => nats / Math.LN2;

const isKnown = ({ hits }) => hits === 1;
