// What a language model learns from corrections, and what it forgets, as client/learning/language.py.

import { DataError } from "../errors.js";
import { encoded } from "./encoding.js";
import { LanguageGraphTrainer } from "./languagegraph.js";
import { descendUntil, withShares } from "./tune.js";

const LEARNING_RATE = 0.005; // of a correction, whose few steps have to change several tokens
const MAX_REHEARSED = 32; // earlier corrections

/**
 * Tune an adapter of an open bundle until it answers prompts as taught: corrections are [{ text, label }], where `label` is
 * the answer to the prompt `text`; `earlier`, those of other lessons, the oldest first, are rehearsed. Of the texts `compared`, [{ text, prompt }], nothing is learned.
 *
 * Returns { inputs, steps, seconds, known, taught, others, compared }: the adapter's graph inputs, how many corrections are learned,
 * the corrections, and the earlier ones, each { text, label, before, after } with bits for each byte of the answer, as the texts compared. `pause` and errors are
 * those of `Learner.teach`.
 */
export async function teachLanguageModel(engine, adapter, corrections, earlier, pause, compared = []) {
  for (const one of corrections) [one.text, one.label].forEach((message) => engine.text.message(message));
  const prompts = new Set(corrections.map((one) => one.text));
  const rehearsed = earlier.filter((one) => !prompts.has(one.text)).reverse().slice(0, MAX_REHEARSED);
  const example = (one) => ({ ...one, ...encoded({ prompt: one.text, text: one.label }, engine.generation) });
  const examples = withShares(corrections.map(example), rehearsed.map(example));
  if (examples.slice(0, corrections.length).some(({ cut }) => cut)) {
    throw new DataError("the answer has more tokens than can be learned: teach a shorter one", "label");
  }
  const read = compared.map((one) => ({ ...one, ...encoded(one, engine.generation), share: 0 }));
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
    return found.scores.slice(0, count).every(isKnown);
  };
  const { values, steps } = await descendUntil(isLearned, () => found, start, LEARNING_RATE, pause);
  const seconds = (performance.now() - begun) / 1000;
  const after = found.scores;
  const scores = async (of) => (compared.length ? (await trainer.gradients(of, compared, () => pause(steps))).scores : []);
  const [old, now] = [await scores(start), await scores(values)];
  const cost = (of, i) => of[i].nats / Math.LN2;
  const bits = ({ text, label }, i) => ({ text, label, before: cost(before, i), after: cost(after, i) });
  const rest = compared.map(({ text, prompt }, i) => ({ text, prompt, before: cost(old, i), after: cost(now, i) }));
  const [taught, others] = [examples.slice(0, count), examples.slice(count)].map((group, at) => group.map((one, i) => bits(one, at * count + i)));
  const known = after.slice(0, count).filter(isKnown).length;
  return { inputs: await trainer.inputsOf(values), steps, seconds, known, taught, others, compared: rest };
}

/** Whether a text is the answer without sampling, by its score. */
const isKnown = ({ hits }) => hits === 1;
