// What a classifier learns from corrections, and which other phrases it then answers otherwise.

import { byCodePoint, decode, encode, sha256 } from "../bytes.js";
import { DataError, quoted, translated } from "../errors.js";
import { stripped } from "../text.js";
import { PHRASES } from "../trust.js";
import { probabilities, tune } from "./descent.js";
import { GraphTrainer } from "./trainer.js";

const MAX_REHEARSED = 32; // phrases
const MAX_TESTED = 32; // phrases
const LONGEST_LIST = 2 ** 24; // bytes
const LINES = /\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/; // as Python's str.splitlines

/** Tune an adapter of an open bundle to corrections, [{ text, label }]; `earlier` are those of other lessons, the oldest first.
 *
 * Returns { inputs, steps, seconds, known, taught, changed, tested }: the adapter's graph inputs, how many corrections are answered as
 * taught, the corrections, and those of the tested other phrases that are answered otherwise, each { text, label, before, after, unread }
 * with the answers { label, probability } and how many tokens at the end of the text are not trained on. `pause` and errors are those of
 * `Learner.teach`. */
export async function teachClassifier(engine, adapter, corrections, earlier, pause) {
  const { labels } = adapter.manifest;
  for (const { label } of corrections) {
    if (!labels.includes(label)) throw new DataError(`the adapter lacks the label ${quoted(label, 40)}: choose another`, "label");
  }
  const trainer = await GraphTrainer.open(engine, adapter);
  try {
    return await lesson(engine, trainer, adapter, corrections, earlier, pause);
  } finally {
    await trainer.close();
  }
}

async function lesson(engine, trainer, { manifest, inputs }, corrections, earlier, pause) {
  const example = ({ text, label }) => ({ text, label, ids: trainer.tokens(text), target: manifest.labels.indexOf(label) });
  const phrases = await publicPhrases(engine);
  await engine.text.prepare([...corrections, ...earlier, ...phrases].map(({ text }) => text));
  for (const { text } of corrections) engine.text.phrase(text); // refuses one without a known token
  const taught = corrections.map(example);
  const others = await othersOf(phrases, trainer, earlier, corrections, manifest.labels);
  const [rehearsed, tested] = [others.rehearsed.map(example), others.tested.map(example)];
  const [start, begun] = [await trainer.valuesOf(inputs), performance.now()];
  const { values, steps } = await tune(trainer, start, taught, rehearsed, pause);
  const seconds = (performance.now() - begun) / 1000;
  const asked = [...taught, ...tested].map(({ ids }) => ids);
  const answers = async (of) => predictions(await trainer.logits(of, asked, () => pause(steps)), manifest);
  const [before, after] = [await answers(start), await answers(values)];
  const found = [...taught, ...tested].map(({ text, label }, i) => {
    return { text, label, before: before[i], after: after[i], unread: trainer.unread(text) };
  });
  const [own, rest] = [found.slice(0, taught.length), found.slice(taught.length)];
  const known = own.filter((one) => one.after.label === one.label).length;
  const changed = rest.filter((one) => one.before.label !== one.after.label);
  return { inputs: await trainer.inputsOf(values), steps, seconds, known, taught: own, changed, tested: rest.length };
}

/** What is rehearsed while corrections are taught, and what is tested: recent corrections, and public phrases. */
async function othersOf(known, trainer, earlier, taught, labels) {
  const isUsable = ({ label }) => labels.includes(label);
  const recent = trainer.unlike(earlier.filter(isUsable).reverse(), taught).slice(0, MAX_REHEARSED / 2);
  const ordered = await inLessonOrder(known.filter(isUsable), earlier.length);
  const corrections = [...taught, ...earlier];
  const phrases = trainer.unlike(ordered, corrections);
  const nearestLast = inOwnWords(trainer, phrases, corrections).reverse();
  const oneEach = [...new Map([...phrases, ...nearestLast].map((one) => [one.label, one])).values()];
  const rehearsed = [...recent, ...oneEach].slice(0, MAX_REHEARSED);
  const isRehearsed = ({ text, label }) => rehearsed.some((one) => one.text === text && one.label === label);
  return { rehearsed, tested: [...recent, ...phrases.filter((one) => !isRehearsed(one))].slice(0, MAX_TESTED) };
}

/** Phrases by the share of their tokens that a device's own ones have, the largest first: those in its languages, as natively. */
export function inOwnWords(trainer, phrases, own) {
  const known = new Set(own.flatMap(({ text }) => [...trainer.tokens(text)]));
  const share = (ids) => ids.filter((id) => known.has(id)).length / Math.max(ids.length, 1);
  const rated = phrases.map((phrase) => ({ phrase, share: share(trainer.tokens(phrase.text)) }));
  return rated.sort((left, right) => right.share - left.share).map(({ phrase }) => phrase);
}

async function publicPhrases({ base, source, trust }) {
  return Object.hasOwn(base.files, PHRASES) ? parsePhrases(await trust.file(source, base, PHRASES), PHRASES) : [];
}

/** Public phrases with their labels, one pair a line (edgeadapt/formats/phrases.py), in the bytes of a file: [{ label, text }]. Throws
 * DataError: it is too long, or not UTF-8, or a line has no tab, or nothing on one side of it. The message names the line. */
export function parsePhrases(bytes, name) {
  if (bytes.length > LONGEST_LIST) {
    const reason = `${name} has ${bytes.length} bytes, above the limit of ${LONGEST_LIST}: use a bundle with fewer phrases`;
    throw new DataError(reason, name);
  }
  const text = translated(() => decode(bytes), () => new DataError(`${name} is not UTF-8`, name));
  return text.split(LINES).filter(stripped).map((line, i) => {
    const tab = line.indexOf("\t");
    const [label, phrase] = tab < 0 ? ["", ""] : [stripped(line.slice(0, tab)), stripped(line.slice(tab + 1))];
    if (!label || !phrase) throw new DataError(`phrase ${i + 1} of ${name} has not the form LABEL TAB PHRASE`, name);
    return { label, text: phrase };
  });
}

/** Phrases in the order of a lesson, which is another one for each number: by digest, as natively. */
export async function inLessonOrder(phrases, lesson) {
  const digests = await Promise.all(phrases.map(({ label, text }) => sha256(encode([lesson, label, text].join("\t")))));
  const order = phrases.map((_, i) => i).sort((left, right) => byCodePoint(digests[left], digests[right]) || left - right);
  return order.map((i) => phrases[i]);
}

const predictions = (logits, { labels, temperature }) =>
  logits.map((row) => {
    const found = probabilities(row, temperature);
    const best = found.indexOf(Math.max(...found));
    return { label: labels[best], probability: found[best] };
  });
