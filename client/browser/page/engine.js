// Runs the frozen base of a bundle with one adapter at a time: the counterpart of client/inference/session.py.

import { byCodePoint } from "./bytes.js";
import * as composition from "./composition.js";
import { Conversation, Generation, cacheOutputs } from "./generate.js";
import { MAX_ENVELOPE } from "./dsse.js";
import { ConfigError, DataError, EdgeAdaptError, quoted, translated } from "./errors.js";
import { virtualTokens } from "./graphinputs.js";
import { History } from "./learning/history.js";
import { probabilities } from "./learning/descent.js";
import { checkCombination, judged, policyOf } from "./policy.js";
import * as runtime from "./runtime.js";
import { readerOf } from "./text.js";
import { LOWER, MODEL, TOKENIZER, TRAINING, Trust, WEIGHTS } from "./trust.js";

const MAX_LOADED = 32; // adapters held in memory
const MAX_LOADED_BYTES = 2 ** 28;
const MAX_LEARNED = 2 ** 26; // bytes of an adapter that is taught
export const BARE = ""; // the name of the base without an adapter

export class Engine {
  #loaded = new Map(); // name → { name, parts, labels, rank, temperature, feeds, size }, most recently used last
  #current;
  #trainsOnGpu; // once it is chosen

  /** Use `open`, which verifies. */
  constructor(given) {
    Object.assign(this, given); // { source, trust, base, policy, text, session, generation, runsOn, provider }
    const { trust, base, generation } = given;
    this.history = new History(`${trust.seen.keys}/${base.base_digest}`, trust.seen.store);
    this.conversation = generation && new Conversation(generation);
  }

  /** Verify the base of `source` with the keys of `pem`, and load it. No adapter is in use yet. `progress` is called as by `Trust.base`,
   * and with { starting: true } when the files are verified. `provider` as in `runtime.choose`; `runsOn` says which it is. `store` as of
   * `Trust.open`. Throws TrustError: no pinned key signed it. DataError: a file is missing or cannot be loaded. Or as `choose`. */
  static async open(source, pem, progress = () => {}, provider = undefined, store = undefined) {
    const trust = await Trust.open(pem, store);
    const { manifest: base, files } = await trust.base(source, progress);
    progress({ starting: true });
    return translated(async () => {
      const text = readerOf(files.get(TOKENIZER), files.get("tokenizer_config.json"));
      const { opened: { session, generation }, runsOn } = await runtime.choose((gpu) => loaded(base, files, text, gpu), provider);
      return new Engine({ source, trust, base, policy: policyOf(files), text, session, generation, runsOn, provider });
    }, ({ message }) => new DataError(`this page cannot read the base's tokenizer or settings: ${message}`, TOKENIZER));
  }

  /** The same base with the adapters of another source, of which the one in use is read and verified. Throws as `use`. */
  async from(source) {
    const next = new Engine({ ...this, source });
    if (this.#current) await next.use(this.#current.name);
    return next;
  }

  /** Every adapter, of the bundle or learned here: { name, manifest }, verified, or { name, refused: reason }. */
  async adapters() {
    return Promise.all((await this.adapterNames()).map((name) => this.#listed(name)));
  }

  async adapterNames() {
    const names = [...(await this.source.adapterNames()), ...(await this.history.adapterNames())];
    return [...new Set(names)].sort(byCodePoint);
  }

  /** An adapter, { manifest, inputs }, which is read and verified again. Throws as `Trust.adapter`. */
  async verified(name) {
    const [trust, source] = await this.#origin(name);
    return trust.adapter(source, this.base, name);
  }

  /** The bytes of an adapter's two files: { manifest, blob }. Nothing is verified. */
  async filesOf(name) {
    const [, source] = await this.#origin(name);
    const [manifest, blob] = [`adapters/${name}.json`, `adapters/${name}.onnx_adapter`];
    return { manifest: await source.read(manifest, MAX_ENVELOPE), blob: await source.read(blob, MAX_LEARNED) };
  }

  /** Forget an adapter that is loaded, also as a part of a composition, so that it is read again when it is used. */
  forget(name) {
    for (const [written, { parts }] of this.#loaded) if (parts.includes(name)) this.#loaded.delete(written);
  }

  /** Whom to trust for an adapter, and where it is: what was learned in this browser has a key of its own. */
  async #origin(name) {
    const learned = (await this.history.adapterNames()).includes(name);
    return learned ? [new Trust(await this.history.keys(), this.trust.seen), this.history] : [this.trust, this.source];
  }

  async #listed(name) {
    try {
      const [trust, source] = await this.#origin(name);
      return { name, manifest: await trust.adapterManifest(source, name) };
    } catch (error) {
      if (!(error instanceof EdgeAdaptError)) throw error;
      return { name, refused: error.message };
    }
  }

  get trainable() {
    return Object.hasOwn(this.base.files, TRAINING);
  }

  /** What `open(session)` makes of a session of the training graph, whose files are read and verified again: { session, probe, … } as
   * `choose` takes it, which chooses where the first of them runs, and all after it. Throws as `Trust.file`, `runtime.open`, `choose`;
   * what `open` throws releases the session. */
  async training(open) {
    const names = [TRAINING, LOWER, WEIGHTS].filter((name) => Object.hasOwn(this.base.files, name));
    const read = async (name) => [name, await this.trust.file(this.source, this.base, name)];
    const files = new Map(await Promise.all(names.map(read)));
    const opened = async (gpu) => {
      const session = await runtime.openTraining(files, gpu);
      try {
        return await open(session);
      } catch (error) {
        await session.release();
        throw error;
      }
    };
    if (this.#trainsOnGpu !== undefined) return opened(this.#trainsOnGpu);
    const found = await runtime.choose(opened, this.provider);
    this.#trainsOnGpu = found.gpu;
    return found.opened;
  }

  /** Free the memory of the session, and of what it read. */
  async close() {
    this.generation?.close();
    await this.session.release();
  }

  /** Switch to an adapter or a composition in writing (`global:0.5+anna`), verified on first use; `BARE` is the base alone. After an
   * error the adapter in use is kept. Returns what is in use: { name, rank, parts: [{ name, weight }] }. Throws as `Trust.adapter` and
   * `composition.compose`. */
  async use(text) {
    const parts = text === BARE && this.generation ? [] : composition.parse(text);
    const name = composition.format(parts);
    const loaded = this.#loaded.get(name) ?? (await this.#load(parts));
    this.#loaded.delete(name);
    this.#loaded.set(name, loaded);
    this.#evict();
    this.#current = loaded;
    return { name, rank: loaded.rank, parts };
  }

  /** The `top` most likely labels of a text, most likely first, the share of its tokens that the base does not know, and how many at its
   * end are not read: { adapter, unknown, unread, outcome, says, labels: [{ label, probability }] }, without labels if `policy` says
   * something instead. `adapter` is one of `loaded`; without it, the one in use answers. Throws DataError, ConfigError. */
  async rank(text, top, adapter = this.#inUse(), policy = this.policy) {
    if (this.generation) throw new ConfigError("this base writes text; it has no labels", "base.task");
    const virtual = virtualTokens(adapter.feeds);
    await this.text.prepare([text]);
    const ids = this.text.phrase(text, virtual);
    const tokens = { input_ids: runtime.int64(ids), attention_mask: runtime.int64(ids.map(() => 1)) };
    const { logits } = await runtime.run(this.session, { ...tokens, ...adapter.feeds });
    const found = probabilities(logits.data, adapter.temperature);
    if (!found.every(Number.isFinite)) {
      throw new DataError(`adapter ${quoted(adapter.name)} gives an answer that is not finite; use another adapter`, "logits");
    }
    const answer = judged(policy, this.text.readings(text), best(found, adapter.labels, adapter.labels.length));
    const read = { unknown: this.text.unknownShare(text), unread: this.text.unread(text, virtual) };
    return { adapter: adapter.name, ...read, ...answer, labels: answer.labels.slice(0, top) };
  }

  /** Continue a text; see `Generation.pieces`. Throws DataError, ConfigError. */
  complete(text, options) {
    this.#requireWriter();
    const { feeds } = this.#inUse();
    return this.generation.pieces(this.generation.promptIds(text, virtualTokens(feeds)), feeds, { ...options, asked: text });
  }

  ask(text, options) {
    this.#requireWriter();
    return this.conversation.ask(text, this.#inUse().feeds, options);
  }

  #requireWriter() {
    if (!this.generation) throw new ConfigError("this base classifies phrases; it writes no text", "base.task");
  }

  #inUse() {
    if (!this.#current) throw new ConfigError("no adapter is in use; choose one first", "adapter");
    return this.#current;
  }

  async #load(parts) {
    const verified = [];
    for (const { name } of parts) verified.push(await this.verified(name));
    if (verified.some(({ manifest }) => manifest.parent !== null)) await this.trust.checkPolicy(this.source, this.base);
    checkCombination(this.policy, verified.map(({ manifest }) => manifest));
    return this.loaded(parts, verified);
  }

  /** A composition of verified adapters, ready to answer. Throws as `composition.compose`. */
  loaded(parts, verified) {
    const adapter = parts.length ? composition.compose(parts, verified, this.base) : bare(this.base);
    const size = [...adapter.inputs.values()].reduce((sum, { values }) => sum + values.byteLength, 0);
    const names = parts.map(({ name }) => name);
    return { ...adapter, parts: names, inputs: undefined, feeds: runtime.adapterFeeds(adapter.inputs), size };
  }

  /** Forget the adapters that were used longest ago, except the one that was used now. */
  #evict() {
    const size = () => [...this.#loaded.values()].reduce((sum, each) => sum + each.size, 0);
    while (this.#loaded.size > MAX_LOADED || (this.#loaded.size > 1 && size() > MAX_LOADED_BYTES)) {
      this.#loaded.delete(this.#loaded.keys().next().value);
    }
  }
}

/** A base in memory: { session, generation: null of a classifier, probe: its logits with fixed tokens and a fixed adapter }. */
async function loaded({ task, slots }, files, text, gpu) {
  const generates = task === "text-generation";
  const session = await runtime.open(files, MODEL, { gpu, kept: generates ? cacheOutputs(files) : [] });
  const generation = generates ? new Generation(session, text, files) : null;
  const feeds = runtime.adapterFeeds(runtime.probeAdapter(slots));
  const logits = async (rows) => (await runtime.run(session, { ...runtime.padded(rows), ...feeds })).logits.data;
  const texts = runtime.fixedTexts(text);
  const classified = async () => [await logits(texts.slice(0, 2)), await logits(texts)];
  return { session, generation, probe: generates ? () => generation.probe(feeds) : classified };
}

const bare = ({ slots }) => ({ name: BARE, labels: [], rank: 0, inputs: runtime.emptyAdapter(slots) });

function best(shares, labels, top) {
  const order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a] || a - b);
  return order.slice(0, top).map((i) => ({ label: labels[i], probability: shares[i] }));
}
