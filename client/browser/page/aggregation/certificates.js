// What the fleet's authority signs, certificates and revocation lists (X.509 with Ed25519, RFC 5280 and RFC 8410), and the requests for
// the former (PKCS #10, RFC 2986): as aggregation/pki. All are read in the one form in which the authority writes them. Nothing reads a
// clock: times come from the caller, in milliseconds.

import { base64, encode as utf8, equal, unbase64, unhex } from "../bytes.js";
import { ConfigError, ProtocolError, TrustError, quoted, translated } from "../errors.js";
import { requireStrong, signature, verifies } from "../keys.js";
import { Der, der } from "./der.js";
import { COORDINATOR, DEVICE_ID, MAX_CERTIFICATE } from "./messages.js";

const [ED25519, COMMON_NAME] = ["2b6570", "550403"]; // object identifiers
const [BASIC_CONSTRAINTS, CRL_NUMBER, AUTHORITY_KEY, REASON] = ["551d13", "551d14", "551d23", "551d15"]; // of extensions
const TEXTS = [0x0c, 0x13, 0x16]; // UTF8String, PrintableString, IA5String
const TIMES = [0x17, 0x18]; // UTCTime, GeneralizedTime
const [VERSION, EXTENSIONS, LIST_EXTENSIONS, ATTRIBUTES] = [0xa0, 0xa3, 0xa0, 0xa0]; // context-specific tags
const [CERTIFICATE_V3, LIST_V2] = [2n, 1n];
const MAX_PEM = 8192; // bytes
const MAX_REVOCATIONS = 2 ** 21; // bytes
const DAY = 86_400_000; // milliseconds
const ID = new RegExp(`^(?:${DEVICE_ID})$`);

/** The fields of a certificate, whoever issued it. Throws TrustError: not a certificate, or too large. */
function load(der) {
  if (der.length > MAX_CERTIFICATE) {
    throw new TrustError(`certificate of ${der.length} bytes is over the limit of ${MAX_CERTIFICATE}`, "certificate.size");
  }
  const read = (body) => {
    if (new Der(body.take(VERSION)).integer() !== CERTIFICATE_V3) throw new SyntaxError("not of version 3");
    const [serial, algorithm, issuer] = [body.integer(), algorithmOf(body), body.any().whole];
    const validity = body.sequence();
    const [notBefore, notAfter] = [validity.time(), validity.time()];
    validity.end();
    const [subject, key] = [body.any().whole, body.sequence()];
    return { serial, algorithm, issuer, notBefore, notAfter, subject, key, extensions: body.within(EXTENSIONS) };
  };
  const refusal = ({ message }) => new TrustError(`not a certificate in DER form: ${message}`, "certificate");
  return translated(() => signedPart(der, read), refusal);
}

/** Reads SEQUENCE { body, algorithm, signature }: what `read` finds in the body, with { tbs, signature }. */
function signedPart(der, read) {
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

function algorithmOf(source) {
  const inner = source.sequence();
  const found = inner.oid();
  return inner.done ? found : `${found} with parameters`;
}

/** Whether `authority` signed what `signedPart` read. */
async function isSignedBy(authority, { issuer, algorithm, tbs, signature }) {
  return equal(issuer, authority.subject) && algorithm === ED25519 && verifies({ raw: authority.key }, signature, tbs);
}

function commonName(certificate) {
  const names = [];
  translated(() => {
    const rdns = new Der(certificate.subject).sequence();
    while (!rdns.done) {
      const set = new Der(rdns.take("SET"));
      while (!set.done) {
        const pair = set.sequence();
        const [oid, { tag, content }] = [pair.oid(), pair.any()];
        if (oid === COMMON_NAME) names.push(TEXTS.includes(tag) ? new TextDecoder("utf-8", { fatal: true }).decode(content) : null);
      }
    }
  }, () => new TrustError("certificate has no readable name", "certificate.common-name"));
  if (names.length !== 1 || names[0] === null) {
    throw new TrustError("certificate must have exactly one common name", "certificate.common-name");
  }
  return names[0];
}

/** The 32 bytes of an Ed25519 key. */
function identity(certificate) {
  const raw = translated(() => {
    if (algorithmOf(certificate.key) !== ED25519) throw new SyntaxError("another algorithm");
    const found = certificate.key.bits();
    certificate.key.end();
    return found;
  }, () => new TrustError("certificate has no Ed25519 key", "certificate.key"));
  if (raw.length !== 32) throw new TrustError(`an Ed25519 public key has 32 bytes, not ${raw.length}`, "key.length");
  return requireStrong(raw);
}

/** A Map of object identifier → { critical, value } of extensions, none of which occurs twice. */
function extensionsIn(source) {
  const found = new Map();
  while (!source.done) {
    const entry = source.sequence();
    const oid = entry.oid();
    const critical = entry.flag();
    if (found.has(oid)) throw new SyntaxError("an extension occurs twice");
    found.set(oid, { critical, value: entry.take("OCTETS") });
    entry.end();
  }
  return found;
}

/** Whether a certificate may issue others: the basic constraints are the one extension that is understood here. */
function isAuthority({ extensions }) {
  let found = null;
  translated(() => {
    for (const [oid, { critical, value }] of extensionsIn(extensions)) {
      if (oid === BASIC_CONSTRAINTS) found = constraints(value);
      else if (critical) {
        throw new TrustError(`certificate has the critical extension ${oid}, which is not supported`, "certificate.extension");
      }
    }
  }, () => new TrustError("certificate has an extension twice, or one that is not readable", "certificate.extension"));
  if (found === null) throw new TrustError("certificate has no basic constraints", "certificate.basic-constraints");
  return found;
}

function constraints(value) {
  const outer = new Der(value);
  const inner = outer.sequence();
  outer.end();
  const ca = inner.flag();
  if (!inner.done) inner.integer(); // path length
  inner.end();
  return ca;
}

/** The authority as a device pins it. `authority`: what signs for this root, { subject, key, notAfter }; `revoked`: its newest revocation
 * list, or null. */
export class Root {
  constructor(authority, revoked) {
    Object.assign(this, { authority, revoked });
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
    return new Root(this.authority, revoked);
  }

  /** What this authority certified: { device, key, serial, notBefore, notAfter }. `at`: also require validity at this time. Throws
   * TrustError: not a certificate of this authority for a device, revoked, or not valid at `at`. */
  async verify(der, at = null) {
    const certificate = load(der);
    if (!(await isSignedBy(this.authority, certificate))) {
      throw new TrustError("certificate was not issued by the pinned authority", "certificate.issuer");
    }
    if (isAuthority(certificate)) {
      throw new TrustError("the certificate is an authority's, not a device's", "certificate.basic-constraints");
    }
    const [device, key] = [commonName(certificate), identity(certificate)];
    if (!ID.test(device)) throw new TrustError(`certified name ${quoted(device, 64)} is not a device id`, "certificate.common-name");
    if (equal(key, this.authority.key)) throw new TrustError(`certificate of ${device} has the authority's own key`, "certificate.key");
    if (this.revoked?.serials.has(certificate.serial)) throw new TrustError(`certificate of ${device} is revoked`, "certificate.revoked");
    for (const [holder, { notBefore, notAfter }] of [[device, certificate], ["the authority", this.authority]]) {
      if (at !== null && !(notBefore <= at && at <= notAfter)) {
        throw new TrustError(`certificate of ${holder} is not valid at ${new Date(at).toISOString()}`, "certificate.validity");
      }
    }
    const { serial, notBefore, notAfter } = certificate;
    return { device, key, serial, notBefore, notAfter };
  }
}

/** The list in `der`, if the authority of `root` signed it: { der, number, thisUpdate, nextUpdate, serials }. Throws TrustError: not a
 * complete list of that authority with number and end, or one with an unknown extension. */
export async function readRevocations(root, der) {
  if (der.length > MAX_REVOCATIONS) {
    throw new TrustError(`revocation list of ${der.length} bytes is over the limit of ${MAX_REVOCATIONS}`, "revocations.size");
  }
  const read = (body) => {
    if (body.integer() !== LIST_V2) throw new SyntaxError("not of version 2");
    const [algorithm, issuer, thisUpdate] = [algorithmOf(body), body.any().whole, body.time()];
    const nextUpdate = TIMES.includes(body.next) ? body.time() : null;
    return { algorithm, issuer, thisUpdate, nextUpdate, entries: body.optional(), extensions: body.within(LIST_EXTENSIONS) };
  };
  const refusal = ({ message }) => new TrustError(`not a revocation list in DER form: ${message}`, "revocations");
  const list = translated(() => signedPart(der, read), refusal);
  if (!(await isSignedBy(root.authority, list))) {
    throw new TrustError("revocation list was not signed by the pinned authority", "revocations.signature");
  }
  return translated(() => {
    const number = numberOf(list.extensions);
    if (list.nextUpdate === null) throw new TrustError("revocation list has no end", "revocations.next-update");
    const { thisUpdate, nextUpdate } = list;
    return Object.freeze({ der, number, thisUpdate, nextUpdate, serials: serialsOf(list.entries) });
  }, () => new TrustError("revocation list has no readable number or entries", "revocations.entries"));
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
    const more = entry.optional();
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

/** A request for a certificate for the device `name`, in PEM. `pair`: of Ed25519 (`signingKey`). Throws ConfigError. */
export async function request(pair, name) {
  if (!ID.test(name)) {
    const rule = "1 to 64 letters, digits, '.', '_', ':' or '-', with a letter or digit at both ends";
    throw new ConfigError(`a device cannot be named ${quoted(name, 64)}: ${rule}`, "name");
  }
  const key = new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey));
  const bits = (bytes) => der("BITS", [0], bytes); // no unused bits
  const algorithm = der("SEQUENCE", der("OID", unhex(ED25519)));
  const subject = der("SEQUENCE", der("SET", der("SEQUENCE", der("OID", unhex(COMMON_NAME)), der(TEXTS[0], utf8(name)))));
  const info = der("SEQUENCE", der("INTEGER", [0]), subject, der("SEQUENCE", algorithm, bits(key)), der(ATTRIBUTES));
  return toPem("CERTIFICATE REQUEST", der("SEQUENCE", info, algorithm, bits(await signature(pair.privateKey, info))));
}

const toPem = (label, bytes) =>
  `-----BEGIN ${label}-----\n${base64(bytes).replace(/.{64}(?=.)/g, "$&\n")}\n-----END ${label}-----\n`;

/** The bytes in a PEM text that holds one certificate. Throws TrustError; `what` names the text. */
export function certificateIn(text, what) {
  const match = text.length <= MAX_PEM && /^\s*-----BEGIN CERTIFICATE-----([^-]*)-----END CERTIFICATE-----\s*$/.exec(text);
  const refusal = () => new TrustError(`${what} is not one certificate in PEM form`, "certificate");
  if (!match) throw refusal();
  return translated(() => unbase64(match[1].replace(/\s/g, "")), refusal);
}
