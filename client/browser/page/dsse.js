// Signed documents as DSSE envelopes with Ed25519: as edgeadapt/formats/dsse.py and edgeadapt/formats/jsontext.py. Nothing of a payload is
// parsed before its signature is verified.

import { base64, concat, decode, encode, unbase64 } from "./bytes.js";
import { TrustError, quoted, translated } from "./errors.js";
import { verifies } from "./keys.js";

export const MAX_ENVELOPE = 2 ** 22; // bytes
const MAX_SIGNATURES = 8;
const MAX_DEPTH = 16; // objects and arrays within each other
const HALF = /\p{Surrogate}/u; // a pair counts as one character
const STRINGS = /"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?/g; // of a valid JSON text; those with a colon are keys

/** The value in an envelope that one of `keys` signed as a document of this type. Throws TrustError: no envelope, of another type, of no
 * trusted key, altered, or with a payload that is not sound JSON. */
export async function accept(raw, type, keys) {
  if (raw.length > MAX_ENVELOPE) {
    throw new TrustError(`a signed document of ${raw.length} bytes is above the limit of ${MAX_ENVELOPE}`, "envelope");
  }
  const { payload, signatures } = envelope(raw, type);
  const signed = pae(type, payload);
  for (const { keyid, sig } of signatures) {
    for (const key of keys.filter(({ id }) => ["", id].includes(keyid))) {
      if (await verifies(key, sig, signed)) return translated(() => parse(payload), unsound);
    }
  }
  if (!signatures.some(({ keyid }) => keys.some(({ id }) => id === keyid))) {
    throw new TrustError(`signed by ${quoted(signatures[0].keyid, 40)}, which is not a trusted key`, "keyid");
  }
  throw new TrustError("the signature does not match: the document was altered", "signature");
}

/** The envelope of a value as a document of this type. `sign` makes the signature of bytes, of the key with this `id`. */
export async function sign(value, type, { id, sign: signature }) {
  const payload = encode(JSON.stringify(value));
  const sig = base64(await signature(pae(type, payload)));
  return encode(JSON.stringify({ payload: base64(payload), payloadType: type, signatures: [{ keyid: id, sig }] }));
}

/** The bytes that are signed: DSSE's pre-authentication encoding. */
export function pae(type, payload) {
  const kind = encode(type);
  return concat(encode(`DSSEv1 ${kind.length} `), kind, encode(` ${payload.length} `), payload);
}

/** The value of a JSON text in UTF-8. Throws SyntaxError, TypeError: none, or what edgeadapt/formats/jsontext.py refuses. */
export function parse(bytes) {
  const text = decode(bytes);
  const value = JSON.parse(text);
  const written = [...text.matchAll(STRINGS)].filter(([, colon]) => colon).length;
  if (keysOf(value, MAX_DEPTH) !== written) throw new SyntaxError("a key occurs twice"); // the last one won
  return value;
}

function keysOf(value, left) {
  if (typeof value === "string" && HALF.test(value)) throw new SyntaxError("half of a surrogate pair");
  if (typeof value !== "object" || value === null) {
    if (value === Infinity || value === -Infinity) throw new SyntaxError("a number is too large");
    return 0;
  }
  if (!left) throw new SyntaxError(`nested more than ${MAX_DEPTH} levels deep`);
  const own = Array.isArray(value) ? 0 : Object.keys(value).length;
  if (own && Object.keys(value).some((key) => HALF.test(key))) throw new SyntaxError("half of a surrogate pair");
  return Object.values(value).reduce((sum, inner) => sum + keysOf(inner, left - 1), own);
}

function envelope(raw, type) {
  return translated(() => {
    const { payload, payloadType, signatures: signed } = fields(parse(raw), "payload", "payloadType", "signatures");
    if (!Array.isArray(signed) || !signed.length || signed.length > MAX_SIGNATURES) {
      throw new SyntaxError(`1 to ${MAX_SIGNATURES} signatures are needed`);
    }
    const signatures = signed.map((each) => fields({ keyid: "", ...each }, "keyid", "sig"));
    if (![payloadType, ...signatures.map(({ keyid }) => keyid)].every((text) => typeof text === "string")) {
      throw new SyntaxError("payloadType and keyid are texts");
    }
    const decoded = { payload: unbase64(payload), signatures: signatures.map(({ keyid, sig }) => ({ keyid, sig: unbase64(sig) })) };
    if (payloadType === type) return decoded;
    throw new TrustError(`a document of type ${quoted(payloadType)}, not ${quoted(type)}`, "payloadType");
  }, ({ message }) => new TrustError(`not a signed document (DSSE): ${message}`, "envelope"));
}

function fields(value, ...names) {
  if (!isObject(value) || String(Object.keys(value).sort()) !== String(names)) {
    throw new SyntaxError(`an object with exactly the keys ${names.join(", ")} is needed`);
  }
  return value;
}

const unsound = ({ message }) => new TrustError(`the signed payload is not sound JSON: ${message}`, "payload");

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
