import assert from "node:assert/strict";
import test from "node:test";

import { accept, pae } from "../../../client/browser/page/dsse.js";
import { TrustError } from "../../../client/browser/page/errors.js";
import { pinned, portable, verifies } from "../../../client/browser/page/keys.js";
import { WEB, bytes, made } from "./made.mjs";

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

test("the portable Ed25519 agrees with the browser's own", async () => {
  const holds = await portable(import(new URL("node_modules/@noble/ed25519/index.js", WEB)));
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
  const order = 2n ** 252n + 27742317777372353535851937790883648493n; // RFC 8032, section 5.1.7: S is below it
  const number = BigInt(`0x${Buffer.from(signature.slice(32)).reverse().toString("hex")}`);
  const second = Buffer.from((number + order).toString(16).padStart(64, "0"), "hex").reverse();
  const same = Uint8Array.from([...signature.slice(0, 32), ...second]);
  assert.equal(await holds(key, same, message), false);
  assert.equal(await verifies({ raw: key }, same, message), false);
  assert.equal(await verifies({ raw: key }, signature, message), true);
  assert.equal(await holds(key, signature, message.slice(1)), false);
  assert.equal(await holds(new Uint8Array(32).fill(255), signature, message), false);
  const neutral = Uint8Array.from({ length: 32 }, (_, i) => Number(i === 0)); // of small order: would fit anything
  assert.equal(await holds(neutral, Uint8Array.from([...neutral, ...new Uint8Array(32)]), message), false);
});

test("a signer's R with a part of small order is refused by both, as by a native device", async () => {
  const module = new URL("node_modules/@noble/ed25519/index.js", WEB);
  const library = import(module);
  const { Point } = await library;
  const holds = await portable(library);
  const order = 2n ** 252n + 27742317777372353535851937790883648493n;
  const small = Point.fromHex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a");
  const [secret, nonce, message] = [7n ** 80n, 5n ** 90n, new TextEncoder().encode("message")];
  const key = Point.BASE.multiply(secret).toBytes();
  for (const [r, sound] of [[Point.BASE.multiply(nonce), true], [Point.BASE.multiply(nonce).add(small), false]]) {
    const hashed = new Uint8Array(await crypto.subtle.digest("SHA-512", Buffer.concat([r.toBytes(), key, message])));
    const number = (nonce + BigInt(`0x${Buffer.from(hashed).reverse().toString("hex")}`) * secret) % order;
    const s = Buffer.from(number.toString(16).padStart(64, "0"), "hex").reverse();
    const signature = Uint8Array.from([...r.toBytes(), ...s]);
    assert.equal(await holds(key, signature, message), sound);
    assert.equal(await verifies({ raw: key }, signature, message), sound);
  }
});
