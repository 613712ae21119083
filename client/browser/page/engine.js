// Runs the frozen base of a bundle with one adapter at a time: the counterpart of client/inference/session.py.

import { ConfigError, DataError, EdgeAdaptError, quoted } from "./errors.js";
import { Generation } from "./generate.js";
import * as runtime from "./runtime.js";
import { Text } from "./text.js";
import { TOKENIZER, Trust } from "./trust.js";

const MAX_LOADED = 32; // adapters held in memory
export const BARE = ""; // the name of the base without an adapter

export class Engine {
  #loaded = new Map(); // name → { manifest, feeds }, most recently used last
  #current;

  /** Use `open`, which verifies. */
  constructor(source, trust, base, session, text, generation) {
    Object.assign(this, { source, trust, base, session, text, generation });
  }

  /**
   * Verify the base of `source` with the keys of `pem`, and load it. No adapter is in use yet.
   *
   * Throws TrustError: no pinned key signed it. DataError: a file is missing or cannot be loaded.
   */
  static async open(source, pem) {
    const trust = await Trust.open(pem);
    const { manifest: base, files } = await trust.base(source);
    const session = await runtime.open(files);
    try {
      const text = new Text(files.get(TOKENIZER), files.get("tokenizer_config.json"));
      const generation = base.task === "text-generation" ? new Generation(session, text, files) : null;
      return new Engine(source, trust, base, session, text, generation);
    } catch (error) {
      if (error instanceof EdgeAdaptError) throw error;
      throw new DataError(`this page cannot read the base's tokenizer or settings: ${error.message}`, TOKENIZER);
    }
  }

  /** The manifest of the adapter in use, or null. */
  get adapter() {
    return this.#current?.manifest ?? null;
  }

  /** Every adapter of the bundle: { name, manifest }, verified, or { name, refused: reason }. */
  async adapters() {
    const adapters = [];
    for (const name of await this.source.adapterNames()) {
      try {
        adapters.push({ name, manifest: await this.trust.adapterManifest(this.source, name) });
      } catch (error) {
        if (!(error instanceof EdgeAdaptError)) throw error;
        adapters.push({ name, refused: error.message });
      }
    }
    return adapters;
  }

  /** Free the memory of the session. */
  async close() {
    await this.session.release();
  }

  /** Switch to an adapter, verified on first use; `BARE` is the base alone. After an error the adapter in use is kept. */
  async use(name) {
    const loaded = this.#loaded.get(name) ?? (await this.#load(name));
    this.#loaded.delete(name);
    this.#loaded.set(name, loaded);
    if (this.#loaded.size > MAX_LOADED) this.#loaded.delete(this.#loaded.keys().next().value);
    this.#current = loaded;
    return loaded.manifest;
  }

  /** The `top` most likely labels of a text, most likely first: [{ label, probability }]. Throws DataError, ConfigError. */
  async rank(text, top) {
    if (this.generation) throw new ConfigError("this base writes text; it has no labels", "base.task");
    const { manifest, feeds } = this.#inUse();
    const ids = this.text.phrase(text);
    const tokens = { input_ids: runtime.int64(ids), attention_mask: runtime.int64(ids.map(() => 1)) };
    const { logits } = await runtime.run(this.session, { ...tokens, ...feeds });
    return best(softmax(logits.data, manifest), manifest.labels, top);
  }

  /** Continue a prompt; see `Generation.pieces`. Throws DataError, ConfigError. */
  pieces(prompt, options) {
    if (!this.generation) throw new ConfigError("this base classifies phrases; it writes no text", "base.task");
    return this.generation.pieces(prompt, this.#inUse().feeds, options);
  }

  #inUse() {
    if (!this.#current) throw new ConfigError("no adapter is in use; choose one first", "adapter");
    return this.#current;
  }

  async #load(name) {
    const bare = name === BARE && this.generation;
    const { manifest, inputs } = bare
      ? { manifest: null, inputs: runtime.emptyAdapter(this.base.slots) }
      : await this.trust.adapter(this.source, this.base, name);
    return { manifest, feeds: runtime.adapterFeeds(inputs) };
  }
}

/** Probabilities from logits, which the adapter's temperature divides. Throws DataError: one is not finite. */
function softmax(logits, { name, temperature }) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const exponentials = Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  const sum = exponentials.reduce((a, b) => a + b, 0);
  const probabilities = exponentials.map((value) => value / sum);
  if (!probabilities.every(Number.isFinite)) {
    throw new DataError(`adapter ${quoted(name)} gives an answer that is not finite; use another adapter`, "logits");
  }
  return probabilities;
}

function best(probabilities, labels, top) {
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
  return order.slice(0, top).map((i) => ({ label: labels[i], probability: probabilities[i] }));
}
