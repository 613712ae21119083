// Runs the engine in a thread of its own, so that the page stays responsive. Requests are answered one after the other,
// except `stop`, which ends the text that is being generated.
//
// In:  { id, method, args }     Out: { id, piece }* then { id, result } or { id, error: { name, message, about } }

import { Engine } from "./engine.js";
import { ConfigError, EdgeAdaptError } from "./errors.js";
import { threads } from "./runtime.js";
import { seeded } from "./sampling.js";
import { fetched, FolderSource, HttpSource } from "./sources.js";

const MAX_KEYS = 2 ** 16; // bytes

let engine; // of the open bundle, if any
let stopped = false;
let queue = Promise.resolve();

const methods = {
  /** Open the served bundle or the picked `files`, with the served keys or the picked ones. */
  async open({ files, pem }) {
    const here = new URL("./", self.location.href);
    const source = files ? new FolderSource(files) : new HttpSource(new URL("bundle/", here), new URL("bundle.json", here));
    const keys = pem ?? new TextDecoder().decode(await fetched(new URL("trust.pem", here), "trust.pem", MAX_KEYS));
    const next = await Engine.open(source, keys);
    const adapters = await next.adapters();
    await engine?.close();
    engine = next;
    const { task, profile, base_digest: base } = engine.base;
    return { task, profile, base, adapters, threads: threads(), chat: Boolean(engine.generation?.chat) };
  },

  async use({ name }) {
    const start = performance.now();
    const manifest = await opened().use(name);
    return { manifest, milliseconds: performance.now() - start };
  },

  async rank({ text, top }) {
    const start = performance.now();
    const labels = await opened().rank(text, top);
    return { labels, milliseconds: performance.now() - start, adapter: opened().adapter.name };
  },

  async generate({ prompt, seed, ...options }, piece) {
    const start = performance.now();
    let first, tokens = 0;
    stopped = false;
    for await (const next of opened().pieces(prompt, { ...options, random: seeded(seed) })) {
      first ??= performance.now();
      tokens += 1;
      piece(next);
      await otherMessages();
      if (stopped) break;
    }
    const end = performance.now();
    return { tokens, first: (first ?? end) - start, milliseconds: end - start, stopped };
  },
};

self.onmessage = ({ data: { id, method, args } }) => {
  if (method === "stop") stopped = true;
  else queue = queue.then(() => answer(id, method, args));
};

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

function opened() {
  if (!engine) throw new ConfigError("no bundle is open; open one first", "bundle");
  return engine;
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
