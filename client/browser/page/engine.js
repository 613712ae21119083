// Answers with the frozen base of a bundle and one adapter at a time: the counterpart of client/inference/session.py.

import { ConfigError, DataError, EdgeAdaptError, quoted } from "./errors.js";
import { Generation } from "./generate.js";
import * as runtime from "./runtime.js";
import { Text } from "./text.js";
import { TOKENIZER, Trust } from "./trust.js";

const MAX_LOADED = 32; // adapters held in memory
export const BARE = ""; // the name of the base without an adapter

export class Engine {
  #loaded = new Map(); // name → { sidecar, feeds }, most recently used last
  #current;

  /** Use `open`, which verifies. */
  constructor(source, trust, card, session, text, generation) {
    Object.assign(this, { source, trust, card, session, text, generation });
  }

  /**
   * Verify the base of `source` with the keys of `pem` and load it. No adapter is in use yet.
   *
   * Throws TrustError: not what a pinned key signed. DataError: a file is missing or cannot be loaded.
   */
  static async open(source, pem) {
    const trust = await Trust.open(pem);
    const { card, files } = await trust.base(source);
    const session = await runtime.open(files);
    try {
      const text = new Text(files.get(TOKENIZER), files.get("tokenizer_config.json"));
      const generation = card.task === "text-generation" ? new Generation(session, text, files) : null;
      return new Engine(source, trust, card, session, text, generation);
    } catch (error) {
      if (error instanceof EdgeAdaptError) throw error;
      throw new DataError(`the base's tokenizer or settings cannot be read by this page: ${error.message}`);
    }
  }

  /** What is said of the adapter in use, or null. */
  get adapter() {
    return this.#current?.sidecar ?? null;
  }

  /** Every adapter that the bundle lists: { name, sidecar } with a verified sidecar, or { name, refused }. */
  async adapters() {
    const rows = [];
    for (const name of await this.source.adapterNames()) {
      try {
        rows.push({ name, sidecar: await this.trust.sidecar(this.source, name) });
      } catch (error) {
        if (!(error instanceof EdgeAdaptError)) throw error;
        rows.push({ name, refused: error.message });
      }
    }
    return rows;
  }

  /** Free the memory of the session. */
  async close() {
    await this.session.release();
  }

  /**
   * Switch to an adapter, verifying it when it is first used; `BARE` is the base alone. On an error the one in use stays.
   */
  async use(name) {
    const loaded = this.#loaded.get(name) ?? (await this.#load(name));
    this.#loaded.delete(name);
    this.#loaded.set(name, loaded);
    if (this.#loaded.size > MAX_LOADED) this.#loaded.delete(this.#loaded.keys().next().value);
    this.#current = loaded;
    return loaded.sidecar;
  }

  /** The `top` most likely labels of a text, best first: [{ label, probability }]. Throws DataError, ConfigError. */
  async rank(text, top) {
    if (this.generation) throw new ConfigError("this base writes text; it has no labels");
    const { sidecar, feeds } = this.#inUse();
    const ids = this.text.phrase(text);
    const tokens = { input_ids: runtime.int64(ids), attention_mask: runtime.int64(ids.map(() => 1)) };
    const { logits } = await runtime.run(this.session, { ...tokens, ...feeds });
    return best(softmax(logits.data, sidecar.name), sidecar.labels, top);
  }

  /** Continue a prompt; see `Generation.pieces`. Throws DataError, ConfigError. */
  pieces(prompt, options) {
    if (!this.generation) throw new ConfigError("this base gives labels; it writes no text");
    return this.generation.pieces(prompt, this.#inUse().feeds, options);
  }

  #inUse() {
    if (!this.#current) throw new ConfigError("no adapter is in use; choose one first");
    return this.#current;
  }

  async #load(name) {
    const bare = name === BARE && this.generation;
    const { sidecar, inputs } = bare
      ? { sidecar: null, inputs: runtime.emptyAdapter(this.card.slots) }
      : await this.trust.adapter(this.source, this.card, name);
    return { sidecar, feeds: runtime.adapterFeeds(this.session, inputs) };
  }
}

function softmax(logits, name) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  const probabilities = powers.map((power) => power / sum);
  if (!probabilities.every(Number.isFinite)) {
    throw new DataError(`adapter ${quoted(name)} gave an answer that is not finite; use another`);
  }
  return probabilities;
}

function best(probabilities, labels, top) {
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
  return order.slice(0, top).map((i) => ({ label: labels[i], probability: probabilities[i] }));
}
