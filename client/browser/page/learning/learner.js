// Tunes the private adapter of a bundle to a person's corrections, puts it into use, and takes it back, as
// client/learning/learner.py: classifier.js and language.js tune, this file keeps the result. It is kept in this browser
// (history.js), and leaves it only if the person exports it.

import { encode, sha256 } from "../bytes.js";
import { pack } from "../container.js";
import { ConfigError, DataError, TrustError, quoted } from "../errors.js";
import { longest } from "../media.js";
import { publicKeyOf, signingKey, toPem } from "../keys.js";
import { adapterManifest, signedAdapterManifest } from "../manifests.js";
import { teachClassifier } from "./classifier.js";
import { corrections as corrected, withLesson, withoutLesson } from "./history.js";
import { teachLanguageModel } from "./language.js";

const PERSONAL = "personal"; // the private adapter that is made of a global one
const MAX_AT_ONCE = 64; // corrections
const MAX_TEXT = 2000; // characters of one
const LOCK = "learn.lock";

export class Learner {
  constructor(engine) {
    this.engine = engine;
  }

  /** Tune the adapter `name` until it answers corrections, [{ text, label }], as taught, and keep the result, as the private adapter that it
   * is or as a new one. Of a language model, `text` is a prompt, and `label` its answer. `compared` are texts, [{ text, prompt }], to see
   * what a language model forgets.
   *
   * `pause` is awaited between the parts of the work, with the number of steps so far, and while texts are compared with { part, of } too.
   * What it throws ends the lesson, and the adapter in use stays, as after every error; while texts are compared it ends the comparison
   * alone.
   *
   * Returns { adapter, version } with what `teachClassifier` or `teachLanguageModel` gives, without the inputs.
   *
   * Throws DataError: a text or label cannot be learned, or none was. ConfigError: the bundle or the adapter cannot be trained, a
   * classifier has texts to compare, another tab is learning, or the result cannot be stored. TrustError: a file is not what was signed. */
  async teach(name, corrections, pause = async () => {}, compared = []) {
    return this.#alone(async (record) => {
      const { engine } = this;
      const adapter = await engine.verified(name);
      const target = adapter.manifest.parent === null ? PERSONAL : name;
      if (target !== name && (await engine.adapterNames()).includes(target)) {
        throw new ConfigError(`there is a private adapter already: use ${quoted(target)}, and teach that`, "adapter");
      }
      checkTaught(corrections);
      if (compared.length && !engine.generation) throw new ConfigError("texts are compared of a language model: leave them out", "compared");
      const tuned = engine.generation ? teachLanguageModel : teachClassifier;
      const { inputs, ...found } = await tuned(engine, adapter, corrections, corrected(record), pause, compared);
      if (!found.known) {
        const reason = `nothing was learned in ${found.steps} steps; the adapter in use stays: teach something else`;
        throw new DataError(reason, "corrections");
      }
      const version = await this.#keep(record, { manifest: adapter.manifest, target, corrections, inputs });
      return { adapter: target, version, ...found };
    });
  }

  /** Go back to the adapter before the last lesson: { adapter, version, corrections }, where a private adapter that was made by the
   * lesson is gone, and `adapter` and `version` are null. Throws DataError: no lesson is left; or as `teach`. */
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
      card: undefined, // nor has the owner of the shared one released it
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
    return history.store.lock(`edgeadapt/${LOCK}/${history.place}`, { ifAvailable: true }, async (lock) => {
      if (lock) return work(await history.load());
      throw new ConfigError("another tab is learning with this bundle: try again when it has ended", LOCK);
    });
  }
}

function checkTaught(corrections) {
  if (!corrections.length || corrections.length > MAX_AT_ONCE) {
    throw new DataError(`${corrections.length} corrections are given: teach 1 to ${MAX_AT_ONCE} at once`, "corrections");
  }
  if (new Set(corrections.map(({ text }) => text)).size < corrections.length) {
    throw new DataError("a phrase is given twice: teach it with one label or answer", "corrections");
  }
  for (const one of corrections) {
    const long = ["text", "label"].find((part) => [...one[part]].length > longest(one[part], MAX_TEXT));
    if (long) throw new DataError(`the correction is above the limit of ${MAX_TEXT} characters: shorten it`, long);
  }
}
