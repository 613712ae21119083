// Tunes the private adapter of a bundle to a person's corrections, puts it into use, and takes it back, as
// client/learning/learner.py. It is kept in this browser (history.js), and leaves it only if the person exports it.

import { byCodePoint, encode, sha256 } from "../bytes.js";
import { pack } from "../container.js";
import { ConfigError, DataError, TrustError, quoted } from "../errors.js";
import { publicKeyOf, signingKey, toPem } from "../keys.js";
import { adapterManifest, signedAdapterManifest } from "../manifests.js";
import { PHRASES } from "../trust.js";
import { corrections as corrected, withLesson, withoutLesson } from "./history.js";
import { parsePhrases } from "./phrases.js";
import { GraphTrainer } from "./trainer.js";
import { probabilities, tune } from "./tune.js";

const PERSONAL = "personal"; // the private adapter that is made of a global one
const MAX_AT_ONCE = 64; // corrections
const MAX_TEXT = 2000; // characters of one
const MAX_REHEARSED = 32; // phrases
const MAX_TESTED = 32; // phrases
const LOCK = "learn.lock";

export class Learner {
  constructor(engine) {
    this.engine = engine;
  }

  /**
   * Tune the adapter `name` until it answers corrections, [{ text, label }], as taught, and keep the result, as the private
   * adapter that it is or as a new one. `pause` is awaited between the parts of the work, with the number of steps so far;
   * what it throws ends the lesson, and the adapter in use stays, as after every error.
   *
   * Returns { adapter, version, steps, seconds, taught, changed, tested }: the corrections, and those of the tested other
   * phrases that are answered otherwise, each { text, label, before, after } with the answers { label, probability }.
   *
   * Throws DataError: a text or label cannot be learned, or none was. ConfigError: the bundle or the adapter cannot be
   * trained, another tab is learning, or the result cannot be stored. TrustError: a file is not what was signed.
   */
  async teach(name, corrections, pause = async () => {}) {
    return this.#alone(async (record) => {
      const { engine } = this;
      const adapter = await engine.verified(name);
      const target = adapter.manifest.parent === null ? PERSONAL : name;
      if (target !== name && (await engine.adapterNames()).includes(target)) {
        throw new ConfigError(`there is a private adapter already: use ${quoted(target)}, and teach that`, "adapter");
      }
      checkTaught(corrections, adapter.manifest.labels);
      const trainer = await GraphTrainer.open(engine, adapter);
      try {
        return await this.#learned(record, { adapter, target, corrections, trainer, pause });
      } finally {
        await trainer.close();
      }
    });
  }

  async #learned(record, { adapter, target, corrections, trainer, pause }) {
    const { manifest, inputs } = adapter;
    const example = ({ text, label }) => ({ text, label, ids: trainer.tokens(text), target: manifest.labels.indexOf(label) });
    for (const { text } of corrections) this.engine.text.phrase(text); // refuses one without a known token
    const taught = corrections.map(example);
    const others = await this.#others(corrected(record), corrections, manifest.labels);
    const [rehearsed, tested] = [others.rehearsed.map(example), others.tested.map(example)];
    const [start, begun] = [trainer.valuesOf(inputs), performance.now()];
    const { values, steps } = await tune(trainer, start, taught, rehearsed, pause);
    const seconds = (performance.now() - begun) / 1000;
    const asked = [...taught, ...tested].map(({ ids }) => ids);
    const answers = async (of) => predictions(await trainer.logits(of, asked, () => pause(steps)), manifest);
    const [before, after] = [await answers(start), await answers(values)];
    const found = [...taught, ...tested].map(({ text, label }, i) => ({ text, label, before: before[i], after: after[i] }));
    const [own, rest] = [found.slice(0, taught.length), found.slice(taught.length)];
    if (!own.some((one) => one.after.label === one.label)) {
      const reason = `nothing was learned in ${steps} steps; the adapter in use stays: teach other phrases`;
      throw new DataError(reason, "corrections");
    }
    const version = await this.#keep(record, { manifest, target, corrections, inputs: trainer.inputsOf(values) });
    const changed = rest.filter((one) => one.before.label !== one.after.label);
    return { adapter: target, version, steps, seconds, taught: own, changed, tested: rest.length };
  }

  /**
   * Go back to the adapter before the last lesson: { adapter, version, corrections }, where a private adapter that was made
   * by the lesson is gone, and `adapter` and `version` are null. Throws DataError: no lesson is left; or as `teach`.
   */
  async undo() {
    return this.#alone(async (loaded) => {
      const { lesson, record } = withoutLesson(loaded);
      const { name, before, corrections } = lesson;
      if (!before) {
        await this.#save(record, name);
        return { adapter: null, version: null, corrections };
      }
      const keys = [...this.engine.trust.keys, await publicKeyOf(record.key)];
      const manifest = await adapterManifest(before.manifest, keys);
      if ((await sha256(before.blob)) !== manifest.sha256) {
        throw new TrustError("the adapter before the lesson is damaged; the one in use stays", "undo");
      }
      const current = await adapterManifest(loaded.adapters[name].manifest, keys);
      const next = { ...manifest, version: await this.#next(manifest, current.version) };
      const files = { manifest: await signedAdapterManifest(next, record.key), blob: before.blob };
      await this.#save({ ...record, adapters: { ...record.adapters, [name]: files } }, name);
      return { adapter: name, version: next.version, corrections };
    });
  }

  /** An adapter that was learned here, as files for other devices: { manifest, blob, pem } as bytes. Throws DataError. */
  async exported(name) {
    const { history } = this.engine;
    const [manifest, blob] = [await history.read(`adapters/${name}.json`), await history.read(`adapters/${name}.onnx_adapter`)];
    const [key] = await history.keys();
    return { manifest, blob, pem: encode(toPem(key)) };
  }

  /** What is rehearsed while corrections are taught, and what is tested: recent corrections, and public phrases. */
  async #others(earlier, taught, labels) {
    const usable = ({ text, label }) => labels.includes(label) && !taught.some((one) => one.text === text);
    const known = new Set(earlier.map(({ text }) => text));
    const phrases = (await this.#phrases()).filter((one) => usable(one) && !known.has(one.text));
    const ordered = await inLessonOrder(phrases, earlier.length);
    const oneEach = [...new Map(ordered.map((one) => [one.label, one])).values()];
    const recent = earlier.filter(usable).reverse().slice(0, MAX_REHEARSED / 2);
    const rehearsed = [...recent, ...oneEach].slice(0, MAX_REHEARSED);
    const isRehearsed = ({ text, label }) => rehearsed.some((one) => one.text === text && one.label === label);
    return { rehearsed, tested: [...recent, ...ordered.filter((one) => !isRehearsed(one))].slice(0, MAX_TESTED) };
  }

  async #phrases() {
    const { base, source, trust } = this.engine;
    return Object.hasOwn(base.files, PHRASES) ? parsePhrases(await trust.file(source, base, PHRASES), PHRASES) : [];
  }

  /** Keep an adapter with these inputs as the result of a lesson; returns its version. */
  async #keep(record, { manifest: old, target, corrections, inputs }) {
    const blob = pack(inputs);
    const digest = await sha256(blob);
    const made = {
      ...old,
      name: target,
      sha256: digest,
      size: blob.length,
      format: "fp32",
      version: await this.#next({ ...old, name: target }, old.version),
      source: digest,
      parent: old.parent ?? old.source,
      privacy: null, // of what a device fitted to its own examples, nothing is bounded
    };
    const key = record.key ?? (await signingKey());
    const files = { manifest: await signedAdapterManifest(made, key), blob };
    const before = old.name === target ? await this.engine.filesOf(target) : null;
    const taught = corrections.map(({ text, label }) => ({ text, label }));
    await this.#save(withLesson({ ...record, key }, { name: target, corrections: taught, before }, files), target);
    return made.version;
  }

  async #next(manifest, current) {
    return Math.max(await this.engine.trust.seen.highest(manifest), current) + 1;
  }

  async #save(record, name) {
    await this.engine.history.save(record);
    this.engine.forget(name);
  }

  /** What `work` does with the stored record while no other tab learns with this base. */
  async #alone(work) {
    const { history } = this.engine;
    return navigator.locks.request(`edgeadapt/${LOCK}/${history.place}`, { ifAvailable: true }, async (lock) => {
      if (lock) return work(await history.load());
      throw new ConfigError("another tab is learning with this bundle: try again when it has ended", LOCK);
    });
  }
}

function checkTaught(corrections, labels) {
  if (!corrections.length || corrections.length > MAX_AT_ONCE) {
    throw new DataError(`${corrections.length} corrections are given: teach 1 to ${MAX_AT_ONCE} at once`, "corrections");
  }
  if (new Set(corrections.map(({ text }) => text)).size < corrections.length) {
    throw new DataError("a phrase is given twice: teach it with one label", "corrections");
  }
  for (const { text, label } of corrections) {
    if (!labels.includes(label)) throw new DataError(`the adapter lacks the label ${quoted(label, 40)}: choose another`, "label");
    if ([...text].length > MAX_TEXT) throw new DataError(`the phrase is above the limit of ${MAX_TEXT} characters: shorten it`, "text");
  }
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
