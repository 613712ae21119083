// Runs the bundle (device.js) in a thread of its own, so that the page stays responsive. `stop` ends the text that is being generated, or
// the lesson; `leave` ends taking part. In:  { id, method, args }     Out: { id, piece }* then { id, result } or { id, error: { name,
// message, about } }

import { Device, FolderSource, HttpSource, invited } from "./device.js";
import { ConfigError, EdgeAdaptError } from "./errors.js";
import "./participation.js"; // now, while the page's server can be reached
import { fetched } from "./sources.js";

const MAX_KEYS = 2 ** 16; // bytes
const INTERVAL = 100; // milliseconds

let current = Promise.resolve(null); // the open bundle, if any
let stopping = new AbortController();

const methods = {
  /** Open the served bundle or the picked `files`, with the served keys or the picked ones, on a `provider`. Its pieces are progress.
   * After an error what was open stays. */
  async open({ files, pem, provider }, piece) {
    const before = current;
    const next = before.then(async (old) => {
      const here = new URL("./", self.location.href);
      const source = files ? new FolderSource(files) : new HttpSource(new URL("bundle/", here), new URL("bundle.json", here));
      const keys = pem ?? new TextDecoder().decode(await fetched(new URL("trust.pem", here), "trust.pem", MAX_KEYS));
      const device = await Device.open({ source, keys, provider, progress: seldom(piece) });
      const about = await device.about();
      await old?.close();
      return { device, about };
    });
    current = next.then(({ device }) => device, () => before);
    return (await next).about;
  },

  invited,
};
const WATCHED = ["chat", "complete", "teach", "takePart"]; // calls of the device whose last argument is an object of options

/** What the device gives; to options are added what cannot be sent here, a signal and callbacks. */
async function called(method, args, piece) {
  const { signal } = stopping;
  const options = WATCHED.includes(method) ? [{ ...args.pop(), signal, onPiece: piece, onProgress: piece }] : [];
  return (await opened())[method](...args, ...options);
}

self.onmessage = async ({ data: { id, method, args } }) => {
  if (method === "stop") {
    stopping.abort();
    stopping = new AbortController();
  } else if (method === "leave") (await current)?.leave();
  else answer(id, method, args);
};

async function answer(id, method, args) {
  try {
    const piece = (each) => self.postMessage({ id, piece: each });
    const result = await (methods[method]?.(...args, piece) ?? called(method, args, piece));
    self.postMessage({ id, result });
  } catch (error) {
    const known = error instanceof EdgeAdaptError;
    if (!known) console.error(error);
    const message = known ? error.message : `the page failed: ${error?.message ?? error}`;
    self.postMessage({ id, error: { name: known ? error.name : "Error", message, about: error.about ?? "" } });
  }
}

async function opened() {
  const device = await current;
  if (!device) throw new ConfigError("no bundle is open; open one first", "bundle");
  return device;
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
