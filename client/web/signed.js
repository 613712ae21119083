// A signed JSON document: one byte string for one value, verified before anything in it is believed.
//
// The counterpart of adapters/signed.py, for documents whose numbers are integers below 2^53. Every other spelling of
// a number reads as something that is written differently, and so is refused like any flipped byte.

import { byCodePoint, decode, encode, unhex } from "./bytes.js";
import { TrustError, quoted } from "./errors.js";
import { verify } from "./keys.js";

export const MAX_DOCUMENT = 2 ** 20; // bytes
const SIGNATURE = 64; // bytes
const ESCAPED = /["\\]|[^ -~]/g;
const SHORT = { '"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t" };

/** JSON as Python writes it with sorted keys, without white space, in ASCII. */
export function canonical(value) {
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "string") return text(value);
  if (typeof value === "number") return Number.isSafeInteger(value) ? String(value) : "?";
  if (Array.isArray(value)) return `[${value.map(canonical)}]`;
  const keys = Object.keys(value).sort(byCodePoint);
  return `{${keys.map((key) => `${text(key)}:${canonical(value[key])}`)}}`;
}

const text = (value) => `"${value.replace(ESCAPED, escape)}"`;

const escape = (sign) =>
  SHORT[sign] ?? sign.replace(/[^]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);

/**
 * Verify a document and return its body.
 *
 * Throws TrustError: damaged, of another kind, of an unknown signer, or not what the signer signed.
 */
export async function accept(raw, kind, keys) {
  if (raw.length > MAX_DOCUMENT) {
    throw new TrustError(`${kind}: ${raw.length} bytes are above the limit of ${MAX_DOCUMENT}`);
  }
  const { body, found, signature, signer, exact } = read(raw, kind);
  if (found !== kind || !exact) {
    throw new TrustError(`${kind}: not a signed document of this kind (damaged, or ${quoted(found, 40)})`);
  }
  const key = keys.find((each) => each.id === signer);
  if (!key) throw new TrustError(`${kind}: signed by ${quoted(signer, 40)}, whom this device does not trust`);
  try {
    await verify(key, kind, encode(canonical(body)), signature);
  } catch {
    throw new TrustError(`${kind}: the signature does not match; the document was altered`);
  }
  return body;
}

function read(raw, kind) {
  let document, written;
  try {
    const json = decode(raw);
    document = JSON.parse(json);
    written = canonical(document) === json; // a nesting too deep for the stack ends here as well
  } catch {
    document = undefined;
  }
  if (!isObject(document) || !["body", "kind", "signature", "signer"].every((key) => Object.hasOwn(document, key))) {
    throw new TrustError(`${kind}: not a signed document (damaged or truncated)`);
  }
  const { body, kind: found, signer } = document;
  const signature = unhex(document.signature);
  const sound = signature?.length === SIGNATURE && Object.keys(document).length === 4 && isObject(body);
  return { body, found, signature, signer, exact: written && sound };
}

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
