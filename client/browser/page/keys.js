// Ed25519 keys: reading the pinned ones, verifying signatures, and signing with a key of this browser, all with WebCrypto.

import { base64, concat, encode, hex, sha256, unhex } from "./bytes.js";
import { ConfigError, TrustError, translated } from "./errors.js";

const SPKI = unhex("302a300506032b6570032100"); // RFC 8410, section 4: everything before the 32 bytes of the key
const BLOCK = /-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\t-\r ]*)-----END PUBLIC KEY-----/g; // \s has more spaces than Python's
const BASE_POINT = "58" + "66".repeat(31); // RFC 8032, section 5.1: a sound key, to ask the browser with
const FIELD = 2n ** 255n - 19n; // RFC 8032, section 5.1
const ORDER_8 = 0x7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd84d3d706a17c7n; // as aggregation/pki/identity.py
const SMALL_ORDER = [0n, 1n, FIELD - 1n, ORDER_8, FIELD - ORDER_8]; // y of the eight points

/** The keys of a trust.pem: [{ raw, id }]. Throws TrustError if the text holds anything else, or none. */
export async function pinned(pem, name = "trust.pem") {
  const blocks = [...pem.matchAll(BLOCK)];
  if (!blocks.length || !/^[\t-\r ]*$/.test(pem.replace(BLOCK, ""))) {
    throw new TrustError(`${name} is not a list of public keys in PEM form`, name);
  }
  return Promise.all(blocks.map(([, text]) => publicKey(text)));
}

async function publicKey(text) {
  const binary = translated(() => atob(text.replace(/\s/g, "")), () => new TrustError("not a public key in PEM form", "trust.pem"));
  const der = Uint8Array.from(binary, (sign) => sign.charCodeAt(0));
  if (der.length !== SPKI.length + 32 || SPKI.some((byte, i) => der[i] !== byte)) {
    throw new TrustError("an Ed25519 public key is needed", "trust.pem");
  }
  const raw = requireStrong(der.slice(SPKI.length));
  return { raw, id: (await sha256(raw)).slice(0, 16) };
}

/** Throws TrustError for a point under which anyone can sign, or a second encoding of a point; else returns `raw`. */
export function requireStrong(raw) {
  const y = BigInt(`0x${hex(raw.slice().reverse())}`) % 2n ** 255n; // without the sign of x
  if (y >= FIELD) throw new TrustError("an Ed25519 key in an encoding that RFC 8032 does not allow", "key.encoding");
  if (SMALL_ORDER.includes(y)) throw new TrustError("a point of small order is no Ed25519 key", "key.small-order");
  return raw;
}

/** One name for a set of keys, whatever their order. */
export const keySet = async (keys) => sha256(encode(keys.map((key) => hex(key.raw)).sort().join()));

/** Whether `signature` is that of `key` on `message` (RFC 8032). Throws ConfigError where the browser does not know Ed25519. */
export async function verifies({ raw }, signature, message) {
  await (known ??= importKey(unhex(BASE_POINT)).catch(() => {
    throw new ConfigError("this browser cannot verify Ed25519 signatures: use a newer one", "key");
  }));
  try {
    return await crypto.subtle.verify("Ed25519", await importKey(raw), signature, message);
  } catch {
    return false; // not a point of the curve
  }
}

let known;

const importKey = (raw) => crypto.subtle.importKey("raw", raw, "Ed25519", false, ["verify"]);

/** A new key pair, whose private half no script can read. Throws ConfigError where the browser does not know Ed25519. */
export function signingKey() {
  const refusal = () => new ConfigError("this browser cannot sign with Ed25519, which learning needs: use a newer one", "key");
  return translated(() => crypto.subtle.generateKey({ name: "Ed25519" }, false, ["sign", "verify"]), refusal);
}

/** The public key of a pair of `signingKey`, as `pinned` gives it. */
export async function publicKeyOf(pair) {
  const raw = new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey));
  return { raw, id: (await sha256(raw)).slice(0, 16) };
}

export const signature = async (key, message) => new Uint8Array(await crypto.subtle.sign("Ed25519", key, message));

export async function signer(pair) {
  return { id: (await publicKeyOf(pair)).id, sign: (message) => signature(pair.privateKey, message) };
}

/** A public key in PEM form, which a trust.pem can contain. */
export const toPem = ({ raw }) =>
  `-----BEGIN PUBLIC KEY-----\n${base64(concat(SPKI, raw))}\n-----END PUBLIC KEY-----\n`;
