// Connects a device in this page to a coordinator: over a WebSocket, one binary message for each request and each answer.

import { ProtocolError } from "../errors.js";
import { blob, decode, encode, mapping, optional, record, text, uint } from "./wire.js";

const STEP = text("[a-z]{1,16}"); // a step, or a field of aggregation/steps.py
const BODY = blob(2 ** 29);
const REQUEST = record({ id: uint(32), step: STEP, fields: mapping(STEP, BODY, 8) });
const ANSWER = record({ id: uint(32), body: optional(BODY), reason: blob(2 ** 10) });
const MAX_REASON = 200; // characters

/** Answers the requests that arrive from `url` as `participant` does, until the connection ends. */
export function connect(participant, url) {
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onmessage = async ({ data }) => socket.send(await answer(participant, new Uint8Array(data)));
  return new Promise((resolve) => {
    socket.onclose = resolve;
  });
}

/** The answer to a request, or the reason of a refusal. Of an error of this device, the coordinator sees that there was one. */
async function answer(participant, raw) {
  const { id, step, fields } = decode(REQUEST, raw);
  try {
    return encode(ANSWER, { id, body: await participant.answer(step, Object.fromEntries(fields)), reason: [] });
  } catch (error) {
    const reason = error instanceof ProtocolError ? error.message : "failed on the device";
    return encode(ANSWER, { id, body: null, reason: new TextEncoder().encode(reason).subarray(0, MAX_REASON) });
  }
}
