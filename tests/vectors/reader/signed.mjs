// Pinned keys and signed documents (docs/reference/bundle-format.md, "Pinned keys" and "Signed documents").

import { createHash, verify } from "node:crypto";

import { parse } from "./json.mjs";
import { Refused, require } from "./refused.mjs";

const MAX_PEM = 2 ** 16; // bytes
const MAX_ENVELOPE = 2 ** 22; // bytes
const MAX_SIGNATURES = 8;
const PREFIX = Buffer.from("302a300506032b6570032100", "hex");
const BLOCK = /-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\t-\r ]*)-----END PUBLIC KEY-----/g;
const P = 2n ** 255n - 19n;
const Z = 0x7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd84d3d706a17c7n;
const SMALL_ORDER = [0n, 1n, P - 1n, Z, P - Z];

export const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

/** The keys of a trust.pem, each as the DER bytes that node:crypto takes. */
export function pinnedKeys(file) {
  require(file && file.length <= MAX_PEM, "trust", "no pinned keys, or too many");
  const text = file.toString("latin1");
  const blocks = [...text.matchAll(BLOCK)];
  require(blocks.length && /^[\t-\r ]*$/.test(text.replace(BLOCK, "")), "trust", "not a list of public keys");
  return blocks.map(([, base64]) => {
    const der = Buffer.from(base64, "base64");
    require(der.length === 44 && der.subarray(0, 12).equals(PREFIX), "trust", "not an Ed25519 key");
    const y = BigInt(`0x${Buffer.from(der.subarray(12)).reverse().toString("hex")}`) % 2n ** 255n;
    require(y < P && !SMALL_ORDER.includes(y), "trust", "not the encoding of a key that only its owner can sign with");
    return der;
  });
}

/** The payload, parsed, of an envelope that one of `keys` signed as a document of this type. */
export function accept(raw, type, keys) {
  const { payload, signatures } = envelope(raw, type);
  const head = `DSSEv1 ${Buffer.byteLength(type)} ${type} ${payload.length} `;
  const signed = Buffer.concat([Buffer.from(head), payload]);
  const named = (keyid) => keys.filter((key) => ["", idOf(key)].includes(keyid));
  const holds = signatures.some(({ keyid, sig }) => named(keyid).some((key) => isSignature(key, sig, signed)));
  require(holds, "signature", "no trusted key signed this");
  try {
    return parse(payload);
  } catch (error) {
    throw new Refused("manifest", error.message);
  }
}

const idOf = (key) => sha256(key.subarray(-32)).slice(0, 16);

function isSignature(key, signature, signed) {
  try {
    return verify(null, signed, { key, format: "der", type: "spki" }, signature);
  } catch {
    return false; // not a point of the curve
  }
}

function envelope(raw, type) {
  require(raw.length <= MAX_ENVELOPE, "envelope", "too large");
  let found;
  try {
    found = parse(raw);
  } catch (error) {
    throw new Refused("envelope", error.message);
  }
  const keys = found instanceof Map ? [...found.keys()].sort().join() : "";
  require(keys === "payload,payloadType,signatures", "envelope", "other keys than those of an envelope");
  const listed = found.get("signatures");
  require(Array.isArray(listed) && listed.length >= 1 && listed.length <= MAX_SIGNATURES, "envelope", "signatures");
  require(typeof found.get("payloadType") === "string", "envelope", "payloadType");
  const signatures = listed.map((each) => {
    require(each instanceof Map, "envelope", "a signature is an object");
    const { sig, keyid = "", ...others } = Object.fromEntries(each);
    require(typeof keyid === "string" && !Object.keys(others).length, "envelope", "a signature has sig and keyid");
    return { keyid, sig: unbase64(sig) };
  });
  const payload = unbase64(found.get("payload"));
  require(found.get("payloadType") === type, "type", `not ${type}`);
  return { payload, signatures };
}

function unbase64(text) {
  require(typeof text === "string", "envelope", "base64 is text");
  const bytes = Buffer.from(text, "base64");
  require(bytes.toString("base64") === text, "envelope", "not base64 of the standard alphabet");
  return bytes;
}
