import assert from "node:assert/strict";
import test from "node:test";

import { TrustError } from "../../../client/browser/page/errors.js";
import { pinned, portable } from "../../../client/browser/page/keys.js";
import { accept } from "../../../client/browser/page/signed.js";
import { WEB, bytes, made } from "./made.mjs";

const raw = bytes(made.signed);
const keys = await pinned(made.keys);

test("pinned keys have the names that Python gives them", () => {
  assert.deepEqual(keys.map((key) => key.id), made.ids);
});

test("a file with anything beside public keys is refused", async () => {
  for (const pem of ["", "x", `${made.keys}x`, made.keys.replace("PUBLIC", "PRIVATE"), made.keys.replace("MCowBQ", "MCowBR")]) {
    await assert.rejects(pinned(pem), TrustError);
  }
});

test("what the signer signed is accepted", async () => {
  const found = await accept(raw, "test/1", keys);
  assert.deepEqual(JSON.parse(JSON.stringify(found)), made.body);
});

test("every flipped bit is found", async () => {
  for (let at = 0; at < raw.length; at++) {
    const flipped = raw.slice();
    flipped[at] ^= 1 << at % 8;
    await assert.rejects(accept(flipped, "test/1", keys), TrustError, `at ${at}`);
  }
});

test("another kind, no pinned signer, and bytes before or after are refused", async () => {
  await assert.rejects(accept(raw, "test/2", keys), /of this kind/);
  await assert.rejects(accept(raw, "test/1", keys.slice(0, 1)), /does not trust/);
  await assert.rejects(accept(raw, "test/1", [{ ...keys[0], id: keys[1].id }]), /signature does not match/);
  for (const other of [[...raw, 32], [32, ...raw], [...raw, 0], []]) {
    await assert.rejects(accept(Uint8Array.from(other), "test/1", keys), TrustError);
  }
});

test("the portable Ed25519 agrees with the browser's own", async () => {
  const holds = await portable(new URL("node_modules/@noble/ed25519/index.js", WEB));
  const pair = await crypto.subtle.generateKey({ name: "Ed25519" }, true, ["sign", "verify"]);
  const key = new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey));
  const message = new TextEncoder().encode("message");
  const signature = new Uint8Array(await crypto.subtle.sign({ name: "Ed25519" }, pair.privateKey, message));
  assert.equal(await holds(key, signature, message), true);
  for (let bit = 0; bit < 512; bit += 37) {
    const flipped = signature.slice();
    flipped[bit >> 3] ^= 1 << bit % 8;
    assert.equal(await holds(key, flipped, message), false);
  }
  assert.equal(await holds(key, signature, message.slice(1)), false);
  assert.equal(await holds(new Uint8Array(32).fill(255), signature, message), false);
  const neutral = Uint8Array.from({ length: 32 }, (_, i) => Number(i === 0)); // of small order: would fit anything
  assert.equal(await holds(neutral, Uint8Array.from([...neutral, ...new Uint8Array(32)]), message), false);
});
