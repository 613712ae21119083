// Runs the engine in a thread of its own, so that the page stays responsive. Requests are answered one after the other,
// except `stop`, which ends the text that is being generated, or the lesson; and two during which others are answered: `renew`, which
// waits for the authority, and `takePart`, until `leave` ends it.
//
// In:  { id, method, args }     Out: { id, piece }* then { id, result } or { id, error: { name, message, about } }

import { sha256 } from "./bytes.js";
import { Engine } from "./engine.js";
import { corrections } from "./learning/history.js";
import { ConfigError, DataError, EdgeAdaptError } from "./errors.js";
import { Identity } from "./identity.js";
import { readInvitation } from "./invitation.js";
import { Learner } from "./learning/learner.js";
import { MAX_STEPS } from "./learning/tune.js";
import { forget, renew, takePart } from "./participation.js";
import { seeded } from "./sampling.js";
import { fetched, FolderSource, HttpSource } from "./sources.js";

const MAX_KEYS = 2 ** 16; // bytes
const INTERVAL = 100; // milliseconds

let engine; // of the open bundle, if any
let stopped = false;
let leaving = new AbortController(); // ends taking part
let queue = Promise.resolve();

const methods = {
  /**
   * Open the served bundle or the picked `files`, with the served keys or the picked ones, on a `provider`. Its pieces are
   * progress.
   */
  async open({ files, pem, provider }, piece) {
    const here = new URL("./", self.location.href);
    const source = files ? new FolderSource(files) : new HttpSource(new URL("bundle/", here), new URL("bundle.json", here));
    const keys = pem ?? new TextDecoder().decode(await fetched(new URL("trust.pem", here), "trust.pem", MAX_KEYS));
    const next = await Engine.open(source, keys, seldom(piece), provider);
    const found = await known(next);
    leaving.abort();
    await engine?.close();
    engine = next;
    const { task, profile, base_digest: base } = engine.base;
    const { limit: context, chat } = engine.generation ?? {};
    const { trainable, runsOn } = engine;
    return { task, profile, base, ...found, trainable, runsOn, context, chat: Boolean(chat) };
  },

  async use({ name }) {
    const start = performance.now();
    const used = await opened().use(name);
    return { ...used, milliseconds: performance.now() - start };
  },

  async rank({ text, top }) {
    const start = performance.now();
    const found = await opened().rank(text, top);
    return { ...found, milliseconds: performance.now() - start };
  },

  /** Teach the adapter `name` corrections; see `Learner.teach`. Its pieces are { steps, most, comparing }. */
  async teach({ name, corrections, compared }, piece) {
    stopped = false;
    const pause = async (steps, comparing) => {
      piece({ steps, most: MAX_STEPS, comparing });
      await otherMessages();
      if (stopped) throw new DataError("the lesson was canceled; the adapter in use stays", "stop");
    };
    const learned = await new Learner(opened()).teach(name, corrections, pause, compared);
    return { ...learned, ...(await known()) };
  },

  /** Take the last lesson back; see `Learner.undo`. */
  async undo() {
    const undone = await new Learner(opened()).undo();
    return { ...undone, ...(await known()) };
  },

  exported: ({ name }) => new Learner(opened()).exported(name),

  /** What a person may know of this browser's identity as a device; null without one. */
  identity: () => identity().shown(),
  enrol: (given) => changed((own) => own.enrol(given)),
  redeem: ({ token, url }) => changed((own) => own.redeem(token, url)),
  install: ({ certificate }) => changed((own) => own.install(certificate)),

  /** What a person compares before this browser enrols with a token: its device, authority and coordinator. */
  async invited({ token }) {
    const { device, authority, coordinator } = await readInvitation(token);
    return { device, authority: await sha256(authority), coordinator: (await sha256(coordinator)).slice(0, 16) };
  },

  /** Whether the certificate was renewed. */
  renew: ({ url }) => renew(identity(), url),

  async forget() {
    leaving.abort();
    await forget(identity());
    return null;
  },

  /** Take part with `examples` and with what this browser was taught; see participation.js. Its pieces are the progress. */
  async takePart({ examples, ...options }, piece) {
    leaving = new AbortController();
    const { history, generation } = opened();
    const example = ({ text, label }) => (generation ? { text: label, prompt: text } : { text, label });
    const taught = corrections(await history.load()).map((one) => ({ ...example(one), split: "train" }));
    const given = { engine, identity: identity(), examples: [...taught, ...examples], ...options };
    await takePart({ ...given, alone, signal: leaving.signal, shown: piece, pause: otherMessages });
    return identity().shown();
  },

  /** Answer a message of the conversation, or continue a text. */
  async generate({ prompt, chat, seed, ...options }, piece) {
    const start = performance.now();
    const { generation, conversation } = opened();
    const sampling = { ...options, random: seeded(seed) };
    let first;
    stopped = false;
    for await (const next of chat ? engine.ask(prompt, sampling) : engine.complete(prompt, sampling)) {
      first ??= performance.now();
      piece(next);
      await otherMessages();
      if (stopped) break;
    }
    const end = performance.now();
    const times = { first: (first ?? end) - start, milliseconds: end - start };
    return { ...generation.last, ...times, remembered: conversation.length };
  },

  /** Begin a new conversation. */
  async reset() {
    opened().conversation?.reset();
  },
};

self.onmessage = ({ data: { id, method, args } }) => {
  if (method === "stop") stopped = true;
  else if (method === "leave") leaving.abort();
  else if (method === "takePart" || method === "renew") answer(id, method, args);
  else alone(() => answer(id, method, args));
};

/** What `work` gives once all work before it is done. */
function alone(work) {
  const found = queue.then(work);
  queue = found.catch(() => {});
  return found;
}

/** This browser's identity as a device with the open base. */
const identity = () => new Identity(opened().base.base_digest);

/** What is shown of the identity once `work` has changed it. */
async function changed(work) {
  await work(identity());
  return identity().shown();
}

async function answer(id, method, args) {
  try {
    const result = await methods[method](args, (piece) => self.postMessage({ id, piece }));
    self.postMessage({ id, result });
  } catch (error) {
    const known = error instanceof EdgeAdaptError;
    if (!known) console.error(error);
    const message = known ? error.message : `the page failed: ${error?.message ?? error}`;
    self.postMessage({ id, error: { name: known ? error.name : "Error", message, about: error.about ?? "" } });
  }
}

/** The adapters, the names of those that were learned here, and how many lessons can be undone. */
async function known(of = engine) {
  const { adapters, lessons } = await of.history.load();
  return { adapters: await of.adapters(), learned: Object.keys(adapters), lessons: lessons.length };
}

function opened() {
  if (!engine) throw new ConfigError("no bundle is open; open one first", "bundle");
  return engine;
}

/** `piece` for progress: called at most every `INTERVAL` while bytes arrive, and at the end. */
function seldom(piece) {
  let last = -Infinity;
  return (progress) => {
    if (progress.received !== progress.total && performance.now() - last < INTERVAL) return;
    last = performance.now();
    piece(progress);
  };
}

/** Handle the messages that wait, such as `stop`. A timer would take four milliseconds each time. */
const otherMessages = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
