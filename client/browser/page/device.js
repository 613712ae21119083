// A verified bundle on this device, for apps: the page's worker runs it, and the package @edgeadapt/device exports it (device.d.ts).

import { Engine } from "./engine.js";
import { ConfigError, DataError } from "./errors.js";
import { corrections as corrected } from "./learning/history.js";
import { Learner } from "./learning/learner.js";
import { MAX_STEPS } from "./learning/descent.js";
import { seeded } from "./sampling.js";
import { Trust } from "./trust.js";

export { ConfigError, DataError, EdgeAdaptError, ProtocolError, TrustError } from "./errors.js";
export { FolderSource, HttpSource } from "./sources.js";
export { Store } from "./storage.js";

const TOP = 5; // labels of an answer
const MAX_TOKENS = 256; // of an answer
const federated = () => import("./participation.js"); // a third of the code, which few apps need

/** Verify a bundle's base and adapters, or those of the names `adapters`, without loading a model. Throws as `Trust.base`, `Trust.adapter`. */
export async function verify({ source, keys, store, adapters }) {
  const trust = await Trust.open(keys, store);
  const { manifest: base } = await trust.base(source);
  const found = {};
  for (const name of adapters ?? (await source.adapterNames())) found[name] = await trust.adapter(source, base, name);
  return { base, adapters: found };
}

/** What a person compares before this device enrols with a token: its device, authority and coordinator. */
export const invited = async (token) => (await federated()).invited(token);

/** Calls are answered one after the other. While `renew` or `takePart` waits, others are answered. */
export class Device {
  #engine;
  #given; // to `open`
  #leaving = new AbortController(); // ends taking part
  #last = Promise.resolve();

  /** Use `open`, which verifies. */
  constructor(engine, given) {
    [this.#engine, this.#given] = [engine, given];
  }

  /** Verify and load a bundle. No adapter is in use yet. Throws as `Engine.open`. */
  static async open(given) {
    return new Device(await engineOf(given), given);
  }

  /** What is open, its adapters, the names of those that were learned here, and how many lessons can be undone. */
  async about() {
    const { base, generation, text, trainable, runsOn } = this.#engine;
    const { limit: context, chat } = generation ?? {};
    const facts = { task: base.task, profile: base.profile, base: base.base_digest, trainable, runsOn, context, chat: Boolean(chat), reads: text.noun };
    return { ...facts, ...(await this.#known()) };
  }

  /** Switch to an adapter or a composition in writing; see `Engine.use`. */
  use(name) {
    return this.#timed((engine) => engine.use(name));
  }

  /** The most likely labels of a text; see `Engine.rank`. */
  classify(text, top = TOP) {
    return this.#timed((engine) => engine.rank(text, top));
  }

  /** Answer a message of the conversation; see `Conversation.ask`. What was written until `signal` aborts is kept. */
  chat(message, options = {}) {
    return this.#write((engine, sampling) => engine.ask(message, sampling), options);
  }

  complete(text, options = {}) {
    return this.#write((engine, sampling) => engine.complete(text, sampling), options);
  }

  reset() {
    return this.#alone(() => this.#engine.conversation?.reset());
  }

  /** Teach the adapter `name` corrections; see `Learner.teach`. `onProgress` is called with { steps, most, comparing }. */
  teach(name, corrections, { compared = [], signal, onProgress = () => {} } = {}) {
    const pause = async (steps, comparing) => {
      onProgress({ steps, most: MAX_STEPS, comparing });
      await otherMessages();
      if (signal?.aborted) throw new DataError("the lesson was canceled; the adapter in use stays", "stop");
    };
    return this.#taught((learner) => learner.teach(name, corrections, pause, compared));
  }

  /** Take the last lesson back; see `Learner.undo`. */
  undo() {
    return this.#taught((learner) => learner.undo());
  }

  /** An adapter that was learned here, as files for other devices; see `Learner.exported`. */
  exported(name) {
    return this.#alone(() => new Learner(this.#engine).exported(name));
  }

  /** Take over what the source has now, or another source. `replaced` says whether the base is another one: then no adapter is in use
   * and taking part ends. Conversations begin again. After an error, what was open stays. Throws as `open`, `use`. */
  update(source = this.#given.source) {
    return this.#alone(async () => {
      const [old, given] = [this.#engine, { ...this.#given, source }];
      const base = await old.trust.baseManifest(source);
      const replaced = JSON.stringify(base) !== JSON.stringify(old.base);
      const next = replaced ? await engineOf(given) : await old.from(source);
      [this.#engine, this.#given] = [next, given];
      if (replaced) {
        this.leave();
        await old.close();
      }
      return { replaced, ...(await this.#known()) };
    });
  }

  /** What a person may know of this device's identity; null without one. */
  identity = () => this.#changed(() => {});
  enrol = (given) => this.#changed((own) => own.enrol(given));
  redeem = (token, url) => this.#changed((own) => own.redeem(token, url));
  install = (certificate) => this.#changed((own) => own.install(certificate));

  /** Whether the certificate was renewed. */
  renew = async (url) => (await federated()).renew(await this.#identity(), url);

  forget() {
    this.leave();
    return this.#changed(async (own) => (await federated()).forget(own));
  }

  /** Take part with `examples` and with what this device was taught, until `leave`; see participation.js. */
  async takePart({ examples = [], onProgress = () => {}, ...options }) {
    if (this.#leaving.signal.aborted) this.#leaving = new AbortController();
    const [engine, signal] = [this.#engine, this.#leaving.signal];
    const [identity, { takePart }] = [await this.#identity(), await federated()];
    const example = ({ text, label }) => (engine.generation ? { text: label, prompt: text } : { text, label });
    const taught = corrected(await engine.history.load()).map((one) => ({ ...example(one), split: "train" }));
    const given = { engine, identity, examples: [...taught, ...examples], ...options };
    const alone = (work) => this.#alone(work);
    await takePart({ ...given, alone, signal, shown: onProgress, pause: otherMessages });
    return identity.shown();
  }

  leave() {
    this.#leaving.abort();
  }

  /** Leave, and free the memory once all calls are answered. */
  close() {
    this.leave();
    return this.#alone(() => this.#engine.close());
  }

  async #identity() {
    const { Identity } = await federated();
    return new Identity(this.#engine.base.base_digest, this.#given.store);
  }

  /** What is shown of the identity once `work` has changed it. */
  #changed(work) {
    return this.#alone(async () => {
      const own = await this.#identity();
      await work(own);
      return own.shown();
    });
  }

  #taught(work) {
    return this.#alone(async () => ({ ...(await work(new Learner(this.#engine))), ...(await this.#known()) }));
  }

  #timed(work) {
    return this.#alone(async () => {
      const start = performance.now();
      return { ...(await work(this.#engine)), milliseconds: performance.now() - start };
    });
  }

  #write(begin, { seed, signal, onPiece = () => {}, ...options }) {
    return this.#alone(async () => {
      const start = performance.now();
      const { generation, conversation } = this.#engine;
      const random = seeded(seed ?? crypto.getRandomValues(new Uint32Array(1))[0]);
      let [text, first] = [""];
      for await (const next of begin(this.#engine, { maxTokens: MAX_TOKENS, ...options, random })) {
        first ??= performance.now();
        text += next.text;
        onPiece(next);
        await otherMessages();
        if (signal?.aborted) break;
      }
      const end = performance.now();
      const times = { first: (first ?? end) - start, milliseconds: end - start };
      return { text, ...generation.last, ...times, remembered: conversation.length };
    });
  }

  async #known() {
    const { adapters, lessons } = await this.#engine.history.load();
    return { adapters: await this.#engine.adapters(), learned: Object.keys(adapters), lessons: lessons.length };
  }

  /** What `work` gives once all work before it is done. */
  #alone(work) {
    const found = this.#last.then(work);
    this.#last = found.catch(() => {});
    return found;
  }
}

function engineOf({ source, keys, progress, provider, store }) {
  if (!source || typeof keys !== "string") throw new ConfigError("give the source of a bundle, and the pinned keys in PEM form", "keys");
  return Engine.open(source, keys, progress, provider, store);
}

/** Handle the messages that wait, such as one that aborts a signal. A timer would take four milliseconds each time. */
const otherMessages = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
