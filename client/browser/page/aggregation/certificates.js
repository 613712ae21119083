// Certificates of the fleet's authority (X.509 with Ed25519, RFC 5280 and RFC 8410), as aggregation/pki/certificates.py. A certificate is
// read in the one form in which the authority writes it. Nothing reads a clock: times come from the caller, in milliseconds.

import { equal } from "../bytes.js";
import { TrustError, quoted } from "../errors.js";
import { requireStrong, verifies } from "../keys.js";
import { Der } from "./der.js";
import { DEVICE_ID, MAX_CERTIFICATE } from "./messages.js";

const ED25519 = "2b6570";
const COMMON_NAME = "550403";
const BASIC_CONSTRAINTS = "551d13";
const TEXTS = [0x0c, 0x13, 0x16]; // UTF8String, PrintableString, IA5String
const [BOOLEAN, VERSION, EXTENSIONS] = [0x01, 0xa0, 0xa3]; // tags
const V3 = 2n;
const ID = new RegExp(`^(?:${DEVICE_ID})$`);

/** The fields of a certificate, whoever issued it. Throws TrustError: not a certificate, or too large. */
function load(der) {
  if (der.length > MAX_CERTIFICATE) {
    throw new TrustError(`certificate of ${der.length} bytes is over the limit of ${MAX_CERTIFICATE}`, "certificate.size");
  }
  try {
    return signedPart(der, (body) => {
      if (new Der(body.take(VERSION)).integer() !== V3) throw new SyntaxError("not of version 3");
      const [serial, algorithm, issuer] = [body.integer(), algorithmOf(body), body.any().whole];
      const validity = body.sequence();
      const [notBefore, notAfter] = [validity.time(), validity.time()];
      validity.end();
      const [subject, key] = [body.any().whole, body.sequence()];
      const extensions = body.next === EXTENSIONS ? new Der(body.take(EXTENSIONS)).sequence() : new Der(new Uint8Array());
      return { serial, algorithm, issuer, notBefore, notAfter, subject, key, extensions };
    });
  } catch (error) {
    throw error instanceof TrustError ? error : new TrustError(`not a certificate in DER form: ${error.message}`, "certificate");
  }
}

/** Reads SEQUENCE { body, algorithm, signature }: what `read` finds in the body, with { tbs, signature }. */
export function signedPart(der, read) {
  const outer = new Der(der);
  const inner = outer.sequence();
  outer.end();
  const { whole: tbs } = inner.any();
  const body = new Der(tbs).sequence();
  const found = read(body);
  body.end();
  if (algorithmOf(inner) !== found.algorithm) throw new SyntaxError("two signature algorithms");
  const signature = inner.bits();
  inner.end();
  return { ...found, tbs, signature };
}

export function algorithmOf(source) {
  const inner = source.sequence();
  const found = inner.oid();
  return inner.done ? found : `${found} with parameters`;
}

/** Whether `authority` signed what `signedPart` read. */
export async function isSignedBy(authority, { issuer, algorithm, tbs, signature }) {
  return equal(issuer, authority.subject) && algorithm === ED25519 && verifies({ raw: authority.key }, signature, tbs);
}

function commonName(certificate) {
  const names = [];
  try {
    const rdns = new Der(certificate.subject).sequence();
    while (!rdns.done) {
      const set = new Der(rdns.take("SET"));
      while (!set.done) {
        const pair = set.sequence();
        const [oid, { tag, content }] = [pair.oid(), pair.any()];
        if (oid === COMMON_NAME) names.push(TEXTS.includes(tag) ? new TextDecoder("utf-8", { fatal: true }).decode(content) : null);
      }
    }
  } catch {
    throw new TrustError("certificate has no readable name", "certificate.common-name");
  }
  if (names.length !== 1 || names[0] === null) {
    throw new TrustError("certificate must have exactly one common name", "certificate.common-name");
  }
  return names[0];
}

/** The 32 bytes of an Ed25519 key. */
function identity(certificate) {
  let raw;
  try {
    const info = new Der(certificate.key.take("SEQUENCE"));
    if (info.oid() !== ED25519) throw new SyntaxError("another algorithm");
    info.end();
    raw = certificate.key.bits();
    certificate.key.end();
  } catch {
    throw new TrustError("certificate has no Ed25519 key", "certificate.key");
  }
  if (raw.length !== 32) throw new TrustError(`an Ed25519 public key has 32 bytes, not ${raw.length}`, "key.length");
  return requireStrong(raw);
}

/** A Map of object identifier → { critical, value } of extensions, none of which occurs twice. */
export function extensionsIn(source) {
  const found = new Map();
  while (!source.done) {
    const entry = source.sequence();
    const oid = entry.oid();
    const critical = entry.next === BOOLEAN && entry.boolean();
    if (found.has(oid)) throw new SyntaxError("an extension occurs twice");
    found.set(oid, { critical, value: entry.take("OCTETS") });
    entry.end();
  }
  return found;
}

/** Whether a certificate may issue others: the basic constraints are the one extension that is understood here. */
function isAuthority({ extensions }) {
  let found = null;
  try {
    for (const [oid, { critical, value }] of extensionsIn(extensions)) {
      if (oid === BASIC_CONSTRAINTS) found = constraints(value);
      else if (critical) {
        throw new TrustError(`certificate has the critical extension ${oid}, which is not supported`, "certificate.extension");
      }
    }
  } catch (error) {
    if (error instanceof TrustError) throw error;
    throw new TrustError("certificate has an extension twice, or one that is not readable", "certificate.extension");
  }
  if (found === null) throw new TrustError("certificate has no basic constraints", "certificate.basic-constraints");
  return found;
}

function constraints(value) {
  const outer = new Der(value);
  const inner = outer.sequence();
  outer.end();
  const ca = inner.next === BOOLEAN && inner.boolean();
  if (!inner.done) inner.integer(); // path length
  inner.end();
  return ca;
}

/** The authority as a device pins it. `der`: its self-signed certificate; `revoked`: its newest revocation list, or null. */
export class Root {
  #authority;

  constructor(authority, revoked) {
    this.#authority = authority;
    this.revoked = revoked;
    Object.freeze(this);
  }

  /** Throws TrustError: not the self-signed certificate of an authority with an Ed25519 key. */
  static async open(der) {
    const certificate = load(der);
    const authority = { ...certificate, key: identity(certificate) };
    if (!(await isSignedBy(authority, certificate))) {
      throw new TrustError("not a self-signed certificate", "authority.certificate");
    }
    if (!isAuthority(certificate)) throw new TrustError("the certificate is not an authority's", "certificate.basic-constraints");
    return new Root(authority, null);
  }

  withRevocations(revoked) {
    return new Root(this.#authority, revoked);
  }

  /** What signs for this root: { subject, key, notAfter }. */
  get authority() {
    return this.#authority;
  }

  /** What this authority certified: { device, key, serial, notBefore, notAfter }. `at`: also require validity at this time. Throws
   * TrustError: not a certificate of this authority for a device, revoked, or not valid at `at`. */
  async verify(der, at = null) {
    const certificate = load(der);
    if (!(await isSignedBy(this.#authority, certificate))) {
      throw new TrustError("certificate was not issued by the pinned authority", "certificate.issuer");
    }
    if (isAuthority(certificate)) {
      throw new TrustError("the certificate is an authority's, not a device's", "certificate.basic-constraints");
    }
    const [device, key] = [commonName(certificate), identity(certificate)];
    if (!ID.test(device)) throw new TrustError(`certified name ${quoted(device, 64)} is not a device id`, "certificate.common-name");
    if (equal(key, this.#authority.key)) throw new TrustError(`certificate of ${device} has the authority's own key`, "certificate.key");
    if (this.revoked?.serials.has(certificate.serial)) throw new TrustError(`certificate of ${device} is revoked`, "certificate.revoked");
    for (const [holder, { notBefore, notAfter }] of [[device, certificate], ["the authority", this.#authority]]) {
      if (at !== null && !(notBefore <= at && at <= notAfter)) {
        throw new TrustError(`certificate of ${holder} is not valid at ${new Date(at).toISOString()}`, "certificate.validity");
      }
    }
    const { serial, notBefore, notAfter } = certificate;
    return { device, key, serial, notBefore, notAfter };
  }
}
