import assert from "node:assert/strict";
import test from "node:test";

import { accept, pae } from "../../../client/browser/page/dsse.js";
import { ConfigError, TrustError } from "../../../client/browser/page/errors.js";
import { pinned, verifies } from "../../../client/browser/page/keys.js";
import { bytes, made } from "./made.mjs";

const TYPE = made.type;
const raw = bytes(made.signed);
const keys = await pinned(made.keys);
const text = new TextDecoder().decode(raw);

test("pinned keys have the names that Python gives them", () => {
  assert.deepEqual(keys.map((key) => key.id), made.ids);
});

test("a file with anything else than public keys is refused", async () => {
  for (const pem of ["", "x", `${made.keys}x`, made.keys.replace("PUBLIC", "PRIVATE"), made.keys.replace("MCowBQ", "MCowBR")]) {
    await assert.rejects(pinned(pem), TrustError);
  }
});

test("a key that anyone can sign for, or in a second encoding, is refused, as on a native device", async () => {
  assert.ok(made.points.some(([, accepted]) => accepted));
  for (const [pem, accepted] of made.points) {
    if (accepted) assert.equal((await pinned(pem)).length, 1);
    else await assert.rejects(pinned(pem), TrustError, pem);
  }
});

test("the signed bytes are those of the specification's example", () => {
  const found = pae("http://example.com/HelloWorld", new TextEncoder().encode("hello world"));
  assert.equal(new TextDecoder().decode(found), "DSSEv1 29 http://example.com/HelloWorld 11 hello world");
});

test("what the signer signed is accepted", async () => {
  assert.deepEqual(await accept(raw, TYPE, keys), made.body);
});

test("a flipped bit anywhere but in the key id is refused", async () => {
  const start = text.indexOf(made.ids[1]);
  for (let at = 0; at < raw.length; at++) {
    const flipped = raw.slice();
    flipped[at] ^= 1 << at % 8;
    const hint = at >= start && at < start + made.ids[1].length;
    const found = await accept(flipped, TYPE, keys).catch((error) => {
      assert.ok(error instanceof TrustError, String(error.stack));
    });
    if (found) assert.ok(hint, `at ${at}`);
  }
});

test("an envelope is accepted exactly if a native device accepts it", async () => {
  assert.ok(made.envelopes.some(([, accepted]) => accepted));
  for (const [envelope, accepted] of made.envelopes) {
    const found = accept(bytes(envelope), TYPE, keys);
    if (accepted) assert.deepEqual(await found, made.body);
    else await assert.rejects(found, TrustError, Buffer.from(envelope, "base64").toString());
  }
});

test("another type, and no pinned signer, are refused", async () => {
  await assert.rejects(accept(raw, `${TYPE}x`, keys), /document of type/);
  await assert.rejects(accept(raw, TYPE, keys.slice(0, 1)), /not a trusted key/);
  await assert.rejects(accept(raw, TYPE, [{ ...keys[0], id: keys[1].id }]), /signature does not match/);
  await assert.rejects(accept(new Uint8Array(2 ** 22 + 1), TYPE, keys), /above the limit/);
});

test("a signature that was altered, of a second encoding, or of a key that anyone can sign with is refused", async () => {
  const pair = await crypto.subtle.generateKey({ name: "Ed25519" }, true, ["sign", "verify"]);
  const raw = new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey));
  const message = new TextEncoder().encode("message");
  const signature = new Uint8Array(await crypto.subtle.sign({ name: "Ed25519" }, pair.privateKey, message));
  assert.equal(await verifies({ raw }, signature, message), true);
  for (let bit = 0; bit < 512; bit += 37) {
    const flipped = signature.slice();
    flipped[bit >> 3] ^= 1 << bit % 8;
    assert.equal(await verifies({ raw }, flipped, message), false);
  }
  const order = 2n ** 252n + 27742317777372353535851937790883648493n; // RFC 8032, section 5.1.7: S is below it
  const number = BigInt(`0x${Buffer.from(signature.slice(32)).reverse().toString("hex")}`);
  const second = Buffer.from((number + order).toString(16).padStart(64, "0"), "hex").reverse();
  assert.equal(await verifies({ raw }, Uint8Array.from([...signature.slice(0, 32), ...second]), message), false);
  assert.equal(await verifies({ raw }, signature, message.slice(1)), false);
  assert.equal(await verifies({ raw: new Uint8Array(32).fill(255) }, signature, message), false);
});

test("a signer's R with a part of small order is refused, as by a native device", async () => {
  const hex = (text) => Uint8Array.from(Buffer.from(text, "hex"));
  const raw = hex("2a95c33fa684e5266b4748365d46ce23c35b1d046eb90da1190d1e56af5fc52f");
  const sound = // R = 5^90 B; the second R has a point of order 8 added, and S follows from each
    "f07da61903f6eb5ae302d806303d8a83eaf631f0f1c43a518cebcbff4164a4a759f738295cc40e36e7c419f8cd4aaaad563a1473306233010f0ea394f238900e";
  const small =
    "bb4915991b45c896f3855042672281ff041c694094b4f3aa7645c241058cd07ef279e88eb6ab595c6c0fc8e78ba5c8df2686e566311e9b57e7a6ef3d210af10d";
  const message = new TextEncoder().encode("message");
  assert.equal(await verifies({ raw }, hex(sound), message), true);
  assert.equal(await verifies({ raw }, hex(small), message), false);
});

test("a browser without Ed25519 says so, and refuses no signature for it", async (t) => {
  t.mock.method(crypto.subtle, "importKey", () => Promise.reject(new DOMException("", "NotSupportedError")));
  const old = await import("../../../client/browser/page/keys.js?old");
  await assert.rejects(old.verifies(keys[0], new Uint8Array(64), raw), ConfigError);
});
