// A signed JSON document: one byte string for one value, verified before anything in it is believed.
//
// The counterpart of adapters/signed.py. Keys are sorted, so the body comes first and its bytes, which the signature
// covers, are everything between the fixed beginning and the fixed end.

import { read, write } from "./canonical.js";
import { decode, encode, unhex } from "./bytes.js";
import { TrustError, quoted } from "./errors.js";
import { verify } from "./keys.js";

export const MAX_DOCUMENT = 2 ** 20; // bytes
const SIGNATURE = 64; // bytes
const BODY = '{"body":';

/**
 * Verify a document and return its body.
 *
 * Throws TrustError: damaged, of another kind, of an unknown signer, or not what the signer signed.
 */
export async function accept(raw, kind, keys) {
  if (raw.length > MAX_DOCUMENT) {
    throw new TrustError(`${kind}: ${raw.length} bytes are above the limit of ${MAX_DOCUMENT}`);
  }
  const { document, text } = parsed(raw, kind);
  const { body, kind: found, signature, signer } = document;
  const bytes = unhex(signature);
  if (found !== kind || Object.keys(document).length !== 4 || bytes?.length !== SIGNATURE || !isObject(body)) {
    throw new TrustError(`${kind}: not a signed document of this kind (damaged, or ${quoted(found, 40)})`);
  }
  const key = keys.find((each) => each.id === signer);
  if (!key) throw new TrustError(`${kind}: signed by ${quoted(signer, 40)}, whom this device does not trust`);
  const end = `,"kind":${write(found)},"signature":${write(signature)},"signer":${write(signer)}}`;
  try {
    await verify(key, kind, encode(text.slice(BODY.length, -end.length)), bytes);
  } catch {
    throw new TrustError(`${kind}: the signature does not match; the document was altered`);
  }
  return body;
}

function parsed(raw, kind) {
  let document, text;
  try {
    text = decode(raw);
    document = read(text);
  } catch {
    document = undefined;
  }
  if (!isObject(document) || !["body", "kind", "signature", "signer"].every((key) => Object.hasOwn(document, key))) {
    throw new TrustError(`${kind}: not a signed document (damaged or truncated)`);
  }
  return { document, text };
}

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
