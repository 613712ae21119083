// Keys, masks and encrypted shares, as aggregation/masks.py, keystream.py, entropy.py and sharing.py: X25519, HKDF-SHA256 and AES-256-CTR
// of WebCrypto. A secret becomes a CryptoKey that cannot be exported as soon as the protocol allows. Shared secrets and mask keys are
// derived from key to key, so their bytes never are in this program's memory.

import { concat, digest, encode as utf8, equal, hex, unhex } from "../bytes.js";
import { ConfigError, ProtocolError } from "../errors.js";
import { AEAD_TAG, SHARE } from "./messages.js";
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

/** 32 private bytes as an Ed25519 or X25519 key. */
export function privateKey(raw, name, usages, extractable = false) {
  return crypto.subtle.importKey("pkcs8", concat(PKCS8[name], raw), name, extractable, usages);
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

/** 32 bytes as a key of `keystream`. */
export const streamKey = (raw) => crypto.subtle.importKey("raw", raw, "AES-CTR", false, ["encrypt"]);

const PRIME = 2n ** 256n + 297n;
const DRAW = 48; // bytes: reduced mod p, 384 bits are uniform to within a distance of 2^-127

const whole = (bytes) => BigInt(`0x${hex(bytes)}`);
const share = (value) => unhex(value.toString(16).padStart(2 * SHARE, "0"));

/** Share the secrets of every round, [{ maskKey, seed }] of 32 bytes each, among the dealer and its neighbors. Returns the dealer's own
 * pairs, one { seed, key } for each round, and a Map of neighbor → encrypted shares. */
export async function deal(session, dealer, shareKey, secrets, entropy) {
  const holders = [dealer, ...session.neighbors(dealer, session.peers.keys())];
  const points = holders.map((device) => session.peers.get(device).position);
  const pairs = new Map(holders.map((holder) => [holder, []]));
  for (const { seed, maskKey } of secrets) {
    const seeds = await split(seed, session.spec.threshold, points, entropy);
    const keys = await split(maskKey, session.spec.threshold, points, entropy);
    holders.forEach((holder, i) => pairs.get(holder).push({ seed: seeds[i], key: keys[i] }));
  }
  const encrypted = new Map();
  for (const holder of holders.slice(1)) {
    encrypted.set(holder, await encrypt(session, shareKey, dealer, holder, pairs.get(holder)));
  }
  return [pairs.get(dealer), encrypted];
}

async function encrypt(session, shareKey, dealer, holder, pairs) {
  const shares = pairs.flatMap(({ seed, key }) => [seed, key]);
  const key = await keyOf(session, shareKey, session.peers.get(holder), dealer, holder);
  const ciphertext = new Uint8Array(await crypto.subtle.encrypt(gcm(session), key, concat(...shares)));
  return { ciphertext, digests: await Promise.all(shares.map(shareDigest)) };
}

/** One pair for each round, or null if the dealer encrypted something that does not match its digests. */
export async function decrypt(session, shareKey, dealer, holder, { ciphertext, digests }) {
  const { rounds } = session.spec;
  if (ciphertext.length !== 2 * rounds * SHARE + AEAD_TAG || digests.length !== 2 * rounds) return null;
  const key = await keyOf(session, shareKey, session.peers.get(dealer), dealer, holder);
  let plain;
  try {
    plain = new Uint8Array(await crypto.subtle.decrypt(gcm(session), key, ciphertext));
  } catch {
    return null; // one bad dealer must not stop the others
  }
  const shares = digests.map((_, i) => plain.slice(SHARE * i, SHARE * (i + 1)));
  const found = await Promise.all(shares.map(shareDigest));
  if (!found.every((one, i) => equal(one, digests[i]))) return null;
  return Array.from({ length: rounds }, (_, i) => ({ seed: shares[2 * i], key: shares[2 * i + 1] }));
}

// The key serves one encryption, so the nonce can be zero.
const gcm = (session) => ({ name: "AES-GCM", iv: new Uint8Array(12), additionalData: session.context });

const shareDigest = async (share) => (await digest(concat(utf8("edgeadapt/share/1\0"), share))).slice(0, 16);

async function keyOf(session, shareKey, peer, dealer, holder) {
  const secret = await sharedSecret(shareKey, peer.shareKey);
  return derive(secret, "AES-GCM", utf8("edgeadapt/share-encryption/1"), session.context, utf8(dealer), utf8(holder));
}

// The dealer's half of Shamir's secret sharing over the integers modulo 2^256 + 297, as aggregation/shamir.py.

/** One share of 33 bytes of `secret` (32 bytes) for each of `points`, distinct positive numbers; any `threshold` of them reconstruct it.
 * `entropy` draws the coefficients, the highest power first. */
async function split(secret, threshold, points, entropy) {
  if (secret.length !== 32 || threshold < 1 || threshold > new Set(points).size || Math.min(...points) < 1) {
    throw new ConfigError(`cannot share ${secret.length} bytes among ${points.length} points`, "shamir.split");
  }
  const drawn = await entropy(DRAW * (threshold - 1));
  const coefficients = Array.from({ length: threshold - 1 }, (_, i) => whole(drawn.subarray(DRAW * i, DRAW * (i + 1))) % PRIME);
  drawn.fill(0);
  coefficients.push(whole(secret));
  return points.map((x) => share(coefficients.reduce((value, next) => (value * BigInt(x) + next) % PRIME, 0n)));
}
