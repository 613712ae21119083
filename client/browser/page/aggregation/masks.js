// Keys and masks, as aggregation/masks.py, keystream.py and entropy.py: X25519, HKDF-SHA256 and AES-256-CTR of WebCrypto.
//
// A secret becomes a CryptoKey that cannot be exported as soon as the protocol allows. Shared secrets and mask keys are
// derived from key to key, so their bytes never are in this program's memory.

import { concat, encode as utf8, hex, unhex } from "../bytes.js";
import { ProtocolError } from "../errors.js";
import { u32 } from "./wire.js";

export const KEY = 32; // bytes of every key and seed
const BLOCK = 2 ** 20; // bytes of keystream at a time
const ZEROS = new Uint8Array(BLOCK);
const PKCS8 = { X25519: unhex("302e020100300506032b656e04220420"), Ed25519: unhex("302e020100300506032b657004220420") }; // RFC 8410
const BASE_POINT = Uint8Array.from({ length: KEY }, (_, i) => (i ? 0 : 9)); // RFC 7748, section 4.1
const FIELD = 2n ** 255n - 19n;
const SMALL_ORDER = [
  0n,
  1n,
  325606250916557431795983626356110631294008115727848805560023387167927233504n,
  39382357235489614581723060781553021112529911719440698176882885853963445705823n,
  FIELD - 1n,
]; // the canonical u-coordinates of small order, as in aggregation/masks.py

/** A source of secret bytes: n → Promise of n bytes. */
export const systemEntropy = async (n) => {
  const bytes = new Uint8Array(n);
  for (let at = 0; at < n; at += 65536) crypto.getRandomValues(bytes.subarray(at, at + 65536)); // its limit
  return bytes;
};

/** The keystream of `key` (AES-CTR) as a source of bytes: equal keys, equal bytes. */
export function derivedEntropy(key) {
  let read = 0;
  return async (n) => {
    const start = read % 16;
    const whole = await keystream(key, read - start, n + start);
    read += n;
    return whole.slice(start);
  };
}

/** Returns if 32 bytes are a canonical X25519 public key that is not of small order; else throws ProtocolError. */
export function requirePublicKey(raw) {
  const point = BigInt(`0x${hex(raw.slice().reverse())}`);
  if (point >= FIELD) throw new ProtocolError("an X25519 key is not in its canonical form", "x25519.encoding");
  if (SMALL_ORDER.includes(point)) throw new ProtocolError("an X25519 key is of small order", "x25519.order");
}

/** 32 private bytes as an Ed25519 or X25519 key that cannot be exported. */
export function privateKey(raw, name, usages) {
  return crypto.subtle.importKey("pkcs8", concat(PKCS8[name], raw), name, false, usages);
}

export const exchangeKey = (raw) => privateKey(raw, "X25519", ["deriveBits", "deriveKey"]);

const peerKey = (raw) => crypto.subtle.importKey("raw", raw, "X25519", false, []);

/** The public key (32 bytes) of an `exchangeKey`: its exchange with the base point (RFC 7748, section 6.1). */
export async function publicKey(key) {
  return new Uint8Array(await crypto.subtle.deriveBits({ name: "X25519", public: await peerKey(BASE_POINT) }, key, 8 * KEY));
}

/** The X25519 shared secret of an `exchangeKey` and a public key, as a key of HKDF. */
export async function sharedSecret(key, raw) {
  return crypto.subtle.deriveKey({ name: "X25519", public: await peerKey(raw) }, key, "HKDF", false, ["deriveKey"]);
}

/** 32 secret bytes as a key of HKDF. */
export const derivable = (raw) => crypto.subtle.importKey("raw", raw, "HKDF", false, ["deriveKey"]);

/** HKDF-SHA256 (RFC 5869) without salt, of a key of HKDF; the info is a sequence of blobs. An AES key of 256 bits. */
export function derive(secret, name, ...bound) {
  const info = concat(...bound.flatMap((part) => [u32(part.length), part]));
  const usages = name === "AES-GCM" ? ["encrypt", "decrypt"] : ["encrypt"];
  const hkdf = { name: "HKDF", hash: "SHA-256", salt: new Uint8Array(), info };
  return crypto.subtle.deriveKey(hkdf, secret, { name, length: 256 }, false, usages);
}

/** The key of the mask that two devices share for one plan; both compute the same one. */
export async function pairKey(key, raw, context, plan, pair) {
  const [low, high] = pair.slice().sort();
  const secret = await sharedSecret(key, raw);
  return derive(secret, "AES-CTR", utf8("edgeadapt/pair-mask/1"), context, plan, utf8(low), utf8(high));
}

/** The key of a device's self mask for one plan, from its seed. */
export function selfKey(seed, context, plan, device) {
  return derive(seed, "AES-CTR", utf8("edgeadapt/self-mask/1"), context, plan, utf8(device));
}

/** Adds or subtracts masks [{ key, add }] on `vector`, a typed array of unsigned integers, in place and wrapping. */
export async function apply(vector, masks) {
  for (const { key, add } of masks) {
    for (let at = 0; at < vector.length; at += BLOCK / vector.BYTES_PER_ELEMENT) {
      const part = vector.subarray(at, at + BLOCK / vector.BYTES_PER_ELEMENT);
      const words = new vector.constructor((await keystream(key, at * vector.BYTES_PER_ELEMENT, part.byteLength)).buffer);
      if (add) for (let i = 0; i < part.length; i++) part[i] += words[i];
      else for (let i = 0; i < part.length; i++) part[i] -= words[i];
    }
  }
}

/** `size` bytes of the keystream of an AES-CTR key from byte `start` on, a multiple of 16. */
export async function keystream(key, start, size) {
  const counter = new Uint8Array(16);
  new DataView(counter.buffer).setBigUint64(8, BigInt(start / 16));
  const zeros = size <= BLOCK ? ZEROS.subarray(0, size) : new Uint8Array(size);
  return new Uint8Array(await crypto.subtle.encrypt({ name: "AES-CTR", counter, length: 64 }, key, zeros));
}
