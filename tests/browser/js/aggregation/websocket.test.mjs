// A page's conversation with a gateway: what it signs, and the requests that it puts together from their parts.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { attend } from "../../../../client/browser/page/aggregation/websocket.js";

Date.now = () => 1_770_000_000_000; // as in the hello that was made

const made = JSON.parse(readFileSync(process.env.EDGEADAPT_CONVERSATION, "utf8"));
const [messages, certificate, hello] = made.map((part) => part.map((hex) => Uint8Array.from(Buffer.from(hex, "hex"))));

/** A gateway that sends `received` once it has the hello, and then closes with `code`. */
function gateway(received, code) {
  const sent = [];
  globalThis.WebSocket = class {
    static OPEN = 1;
    readyState = 1;

    constructor() {
      setTimeout(() => this.onmessage({ data: messages[0].buffer }));
    }

    send(raw) {
      sent.push(raw);
      if (sent.length > 1) return;
      for (const each of received) this.onmessage({ data: each.buffer });
      setTimeout(() => this.close(code), 50);
    }

    close(given) {
      this.onclose({ code: given, reason: "over" });
      this.onclose = () => {};
    }
  };
  return sent;
}

async function attended(received, code = 1008) {
  const [sent, asked, signed] = [gateway(received, code), [], []];
  const device = { certificate: certificate[0], signChallenge: async (raw) => (signed.push(raw), new Uint8Array(64)) };
  const participant = { answer: async (step, fields) => (asked.push([step, fields]), new Uint8Array([1, 2, 3])) };
  const url = "wss://Fleet.Example:9445/edgeadapt.gateway.v1/attend";
  const over = new AbortController();
  const shown = ({ state }) => state === "away" && over.abort();
  await attend({ device, participant, url, signal: over.signal, shown }).catch(() => {});
  return { sent, asked, signed };
}

test("a page signs nonce and host, and gives its participant the fields with their parts joined", async () => {
  const { sent, asked, signed } = await attended(messages.slice(1));
  assert.deepEqual(Buffer.from(signed[0]).subarray(32).toString(), "fleet.example");
  assert.deepEqual(new Uint8Array(sent[0]), hello[0]);
  assert.equal(asked.length, 1);
  const [step, { body, adapter, other }] = asked[0];
  assert.deepEqual([step, body.length, adapter.length, other.length], ["plan", 1, 300_000, 70_000]);
  assert.ok(adapter.every((each, at) => each === at % 251) && other.every((each, at) => each === at % 13));
  assert.equal(sent.length, 3); // the hello, the beginning of the answer, its body
});

test("a part of another size ends the connection", async () => {
  const { asked } = await attended([...messages.slice(1, 3), new Uint8Array(0)]);
  assert.equal(asked.length, 0);
});
