// A device in this page at the coordinator's gateway: over a WebSocket it proves its identity, then answers requests. The messages are
// those of edgeadapt/formats/gateway/messages.py. Whatever can pass by itself is tried again after a pause that grows, or that the gateway
// names; a refusal ends it. An answer that did not reach the gateway, or not the coordinator, which then asks the same once more, is sent
// again and never made again: the device's state has moved on.

import { concat, digest, encode as utf8, equal } from "../bytes.js";
import { ConfigError, ProtocolError, translated } from "../errors.js";
import { MAX_CERTIFICATE, refuse } from "./messages.js";
import { blob, decode, encode, fixed, last, mapping, record, text, uint, uint64 } from "./wire.js";

const NAME = text("[a-z_]{1,32}"); // of a step or a field
const CHALLENGE = record({ nonce: fixed(32) });
const HELLO = record({
  certificate: blob(MAX_CERTIFICATE),
  host: text("[a-z0-9._:-]{1,253}"),
  signature: fixed(64),
  version: text("[0-9A-Za-z.+!-]{1,64}"),
  clock: last(uint(32)),
});
const REQUEST = record({ id: uint64, step: NAME, fields: mapping(NAME, blob(2 ** 16), 8), blobs: mapping(NAME, uint(32), 8) });
const ANSWER = record({ id: uint64, size: uint(32), code: uint(16), reason: blob(400) });
const [REFUSED, FAILED] = [100, 101]; // client/node/step.py
const [RELEASED, INVALID, VIOLATION] = [1001, 1007, 1008]; // close codes; after the last two the same is refused again
const CHUNK = 2 ** 18; // bytes
const [FIRST_PAUSE, LONGEST_PAUSE] = [1000, 60_000]; // milliseconds
const VERSION = "0.1.0"; // of edgeadapt

/** The node of a device on the coordinator's grid, a BigInt: as `node_of` of edgeadapt/formats/gateway/messages.py. */
export async function nodeOf(device) {
  const found = await digest(utf8(`edgeadapt/node\0${device.toLowerCase()}`));
  return new DataView(found.buffer).getBigUint64(0) >> 1n || 1n;
}

/** Answer the requests of the gateway at `url` (wss://, or ws:// on loopback) as `participant` does, until `signal` aborts.
 *
 * `shown` is called with { state: "connecting" | "connected" | "answering" | "failed" | "away", step, error, seconds, released, reason },
 * where `error` is a message, `released` says that the run is over, and `reason` why the gateway sends the device away; empty if the
 * connection broke. Throws ConfigError: the page may not connect there. ProtocolError: the
 * gateway refuses this device, and says why. */
export async function attend({ device, participant, url, signal, shown = () => {} }) {
  const answers = new Answers(participant, shown);
  for (let attempt = 0; !signal?.aborted; ) {
    shown({ state: "connecting" });
    const { code, reason, admitted } = await connection({ device, answers, url, signal, shown });
    if (signal?.aborted) return;
    if (code === INVALID || code === VIOLATION) refuse(`the gateway refuses this device: ${reason}`, "gateway");
    attempt = admitted ? 0 : attempt + 1;
    const { window, text } = sentAway(reason);
    const pause = window ?? Math.min(FIRST_PAUSE * 2 ** attempt, LONGEST_PAUSE) * (0.5 + Math.random() / 2);
    shown({ state: "away", seconds: pause / 1000, released: code === RELEASED, reason: text });
    await waited(pause, signal);
  }
}

/** One connection, until it ends: { code, reason, admitted }. */
async function connection({ device, answers, url, signal, shown }) {
  let [received, request] = [0, null];
  const handle = async (raw, socket) => {
    received += 1;
    if (received === 1) return socket.send(await hello(device, decode(CHALLENGE, raw), new URL(url).hostname));
    if (received === 2 && !raw.length) return shown({ state: "connected" });
    if (request) request.add(raw);
    else request = new Incoming(decode(REQUEST, raw));
    if (!request.complete) return undefined;
    const whole = request;
    request = null;
    return answers.send(socket, whole);
  };
  return { ...(await conversation(url, signal, handle)), admitted: received > 1 };
}

/** A connection, until it is closed or `signal` aborts: { code, reason }. `handle` is called with each message, one after the other, and
 * the socket. Throws ConfigError: no address, or one to which the page may not connect. */
export function conversation(url, signal, handle, begun = () => {}) {
  const refusal = () => new ConfigError(`${url} is not the address of a gateway: wss://HOST:PORT/…`, "url");
  const socket = translated(() => new WebSocket(url), refusal);
  socket.binaryType = "arraybuffer";
  let queue = Promise.resolve();
  socket.onopen = () => begun(socket);
  socket.onmessage = ({ data }) => {
    queue = queue.then(() => handle(new Uint8Array(data), socket)).catch(() => socket.close(3000));
  };
  const leave = () => socket.close(1000);
  signal?.addEventListener("abort", leave);
  return new Promise((resolve) => {
    socket.onclose = ({ code, reason }) => {
      signal?.removeEventListener("abort", leave);
      resolve({ code, reason });
    };
  });
}

/** Only this gateway accepts the signature, since it covers the host whose certificate the browser verified. */
async function hello(device, { nonce }, name) {
  const host = name.replace(/^\[|\]$/g, "");
  const signature = await device.signChallenge(concat(nonce, utf8(host)));
  return encode(HELLO, { certificate: device.certificate, host, signature, version: VERSION, clock: Math.floor(Date.now() / 1000) });
}

/** A request whose blobs come in parts, in the order of their names. */
class Incoming {
  #left; // [name, bytes that are missing], of blobs that are not complete

  constructor({ id, step, fields, blobs }) {
    Object.assign(this, { id, step, fields });
    this.#left = [...blobs].filter(([, size]) => size);
    for (const [name, size] of blobs) fields.set(name, new Uint8Array(size));
  }

  get complete() {
    return !this.#left.length;
  }

  add(part) {
    const [name, left] = this.#left[0];
    if (!part.length || part.length > Math.min(left, CHUNK)) refuse("a part of a request has another size", "part.size");
    const field = this.fields.get(name);
    field.set(part, field.length - left);
    if (left > part.length) this.#left[0] = [name, left - part.length];
    else this.#left.shift();
  }
}

/** Makes answers, and keeps the last one. */
class Answers {
  #last = null; // { request, body, code, reason }

  constructor(participant, shown) {
    Object.assign(this, { participant, shown });
  }

  async send(socket, request) {
    if (!this.#last || !same(this.#last, request)) this.#last = await this.#made(request);
    const { body, code, reason } = this.#last;
    if (socket.readyState !== WebSocket.OPEN) return; // it is sent when the gateway asks again
    socket.send(encode(ANSWER, { id: request.id, size: body.length, code, reason: utf8(reason).subarray(0, 400) }));
    for (let at = 0; at < body.length; at += CHUNK) socket.send(body.subarray(at, at + CHUNK));
    if (!code) this.shown({ state: "connected" });
  }

  async #made(request) {
    this.shown({ state: "answering", step: request.step });
    try {
      const body = await this.participant.answer(request.step, Object.fromEntries(request.fields));
      return { request, body, code: 0, reason: "" };
    } catch (error) {
      const refused = error instanceof ProtocolError;
      if (!refused) console.error(error);
      this.shown({ state: "failed", step: request.step, error: error.message });
      const reason = refused ? error.message : "failed on the device"; // of its own errors nothing more leaves it
      return { request, body: new Uint8Array(0), code: refused ? REFUSED : FAILED, reason };
    }
  }
}

/** Whether a request is the last one, or repeats it; what was refused may be answered when it is repeated. */
function same({ request: last, code }, { id, step, fields }) {
  if (code || last.id === id) return last.id === id;
  const content = [...fields].every(([name, value]) => last.fields.has(name) && equal(last.fields.get(name), value));
  return last.step === step && last.fields.size === fields.size && content;
}

/** What a close reason says: `window`, a random time within its window in milliseconds, or null; and why, as `text`. */
function sentAway(reason) {
  const found = /^([0-9]{1,9})-([0-9]{1,9}) (.*)$/.exec(reason);
  if (!found) return { window: null, text: reason };
  const [from, to] = found.slice(1, 3).map((text) => Math.min(Number(text), 86_400_000));
  return { window: Math.max(FIRST_PAUSE, from + Math.random() * Math.max(0, to - from)), text: found[3] };
}

const waited = (milliseconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });
