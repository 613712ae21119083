// Revocation lists of the fleet's authority (X.509 CRL, RFC 5280, section 5), as aggregation/pki/revocation.py.

import { equal } from "../bytes.js";
import { ProtocolError, TrustError } from "../errors.js";
import { algorithmOf, extensionsIn, isSignedBy, signedPart } from "./certificates.js";
import { Der } from "./der.js";
import { COORDINATOR } from "./messages.js";

const MAX_REVOCATIONS = 2 ** 21; // bytes
const DAY = 86_400_000; // milliseconds
const [CRL_NUMBER, AUTHORITY_KEY, REASON] = ["551d14", "551d23", "551d15"]; // extensions
const EXTENSIONS = 0xa0; // context-specific tag
const [UTC_TIME, GENERALIZED_TIME] = [0x17, 0x18];
const V2 = 1n;

/** The list in `der`, if the authority of `root` signed it: { der, number, thisUpdate, nextUpdate, serials }. Throws TrustError: not a
 * complete list of that authority with number and end, or one with an unknown extension. */
export async function readRevocations(root, der) {
  if (der.length > MAX_REVOCATIONS) {
    throw new TrustError(`revocation list of ${der.length} bytes is over the limit of ${MAX_REVOCATIONS}`, "revocations.size");
  }
  let list;
  try {
    list = signedPart(der, (body) => {
      if (body.integer() !== V2) throw new SyntaxError("not of version 2");
      const [algorithm, issuer, thisUpdate] = [algorithmOf(body), body.any().whole, body.time()];
      const nextUpdate = [UTC_TIME, GENERALIZED_TIME].includes(body.next) ? body.time() : null;
      const entries = body.next === 0x30 ? body.sequence() : new Der(new Uint8Array());
      const extensions = body.next === EXTENSIONS ? new Der(body.take(EXTENSIONS)).sequence() : new Der(new Uint8Array());
      return { algorithm, issuer, thisUpdate, nextUpdate, entries, extensions };
    });
  } catch (error) {
    throw new TrustError(`not a revocation list in DER form: ${error.message}`, "revocations");
  }
  if (!(await isSignedBy(root.authority, list))) {
    throw new TrustError("revocation list was not signed by the pinned authority", "revocations.signature");
  }
  try {
    const number = numberOf(list.extensions);
    if (list.nextUpdate === null) throw new TrustError("revocation list has no end", "revocations.next-update");
    const { thisUpdate, nextUpdate } = list;
    return Object.freeze({ der, number, thisUpdate, nextUpdate, serials: serialsOf(list.entries) });
  } catch (error) {
    if (error instanceof TrustError) throw error;
    throw new TrustError("revocation list has no readable number or entries", "revocations.entries");
  }
}

function numberOf(extensions) {
  let number = null;
  for (const [oid, { value }] of extensionsIn(extensions)) {
    // Delta and partial lists are marked by other extensions.
    if (![CRL_NUMBER, AUTHORITY_KEY].includes(oid)) {
      throw new TrustError(`revocation list has an unsupported extension ${oid}`, "revocations.extension");
    }
    if (oid === CRL_NUMBER) number = new Der(value).integer();
  }
  if (number === null) throw new SyntaxError("no number");
  return number;
}

function serialsOf(entries) {
  const serials = new Set();
  while (!entries.done) {
    const entry = entries.sequence();
    serials.add(entry.integer());
    entry.time();
    const more = entry.done ? new Der(new Uint8Array()) : entry.sequence();
    entry.end();
    for (const oid of extensionsIn(more).keys()) {
      // Such an extension may name another authority's certificate.
      if (oid !== REASON) throw new TrustError("revocation list has an entry of another authority", "revocations.issuer");
    }
  }
  return serials;
}

/** `list`, if a reader that has `seen` may accept it: it is newer, or the same. Throws TrustError. */
export function newerThan(list, seen) {
  if (seen === null || list.number > seen.number || equal(list.der, seen.der)) return list;
  const text = `revocation list ${list.number} is older than, or differs from, ${seen.number}, which was seen before`;
  throw new TrustError(text, "revocations.number");
}

/** Returns if a device may rely at time `at` on the list that it has, or on having none (null); `days` is the greatest age that its
 * policy allows, 0: none. Throws ProtocolError. */
export function requireFresh(list, days, at) {
  const refuse = (text, about) => {
    throw new ProtocolError(`offer refused: ${text}`, `offer.${about}`, COORDINATOR);
  };
  if (list === null) {
    if (days) refuse("the coordinator sent no revocation list, and this device's policy requires one", "revocations");
    return;
  }
  const { number, thisUpdate, nextUpdate } = list;
  if (thisUpdate - at > DAY) refuse(`revocation list ${number} is dated in the future`, "revocations.this-update");
  if (at > nextUpdate) refuse(`revocation list ${number} has ended: get a newer one`, "revocations.next-update");
  if (days && at - thisUpdate > days * DAY) refuse(`revocation list ${number} is older than ${days} days`, "revocations.age");
}
