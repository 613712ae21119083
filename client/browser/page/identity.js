// The identity of this browser as a device of a fleet, in IndexedDB: one record for each base, and one account of all of them.
// A record is replaced as a whole:
//
//   device       name in the certificate
//   pair         CryptoKeyPair of Ed25519; no script can read its private half
//   authority    the pinned authority's certificate, DER
//   coordinator  the pinned coordinator's public key, 32 bytes
//   request      the certificate request, PEM
//   certificate  DER; null until it is installed
//   adapter      what the device remembers of adapters (aggregation/adapterstate.js); null at first
//   log          what it remembers of the coordinator's log (aggregation/logstate.js); null at first
//   revocations  the authority's newest revocation list that the device saw, DER; null at first
//   parts        of an adapter that it trains and does not share (learning/task.js); null at first
//   rounds       [{ at, round, version, outcome }], newest first; `at` in milliseconds
//
// Key and states are in one record, because a device with its key and without its states could be asked for a sum twice. What was
// revealed stays revealed, of whichever base: the account stays when an identity is forgotten, and another base begins no new one.
//
//   privacy          what the contributions of this browser may have revealed (aggregation/privacyledger.js)
//   maximum_epsilon  the limit on it that its person set last; 0: none

import { epsilonOf } from "./aggregation/accounting.js";
import { Root, certificateIn, request } from "./aggregation/certificates.js";
import { Policy } from "./aggregation/policy.js";
import { EMPTY, requireLedger, spent } from "./aggregation/privacyledger.js";
import { equal, sha256 } from "./bytes.js";
import { ConfigError, TrustError } from "./errors.js";
import { certified, readInvitation, renewed } from "./invitation.js";
import { pinned, publicKeyOf, signingKey } from "./keys.js";
import { BROWSER, IDENTITIES } from "./storage.js";

const MAX_ROUNDS = 100; // that are kept
const LEFT = 1 / 3; // of its validity: a certificate that has less left is renewed
const FRESH = { certificate: null, adapter: null, sums: null, log: null, revocations: null, parts: null, rounds: [] };
const ACCOUNT = "account"; // its key; those of the records are digests
const CHANGED = "another tab changed this browser's identity meanwhile: load the page again";
const ENROLLED = "this browser is enrolled already: forget its identity first";
const UNSPENT = { privacy: EMPTY, maximum_epsilon: 0 };

export class Identity {
  constructor(place, store = BROWSER) {
    [this.place, this.store] = [place, store];
  }

  /** The record, with the fields of the account; undefined without one. Throws ConfigError: the browser does not store. TrustError: the
   * account is damaged. */
  async load() {
    const [found, account = UNSPENT] = await this.store.transact(IDENTITIES, [this.place, ACCOUNT]);
    const own = requireAccount(account);
    return found && { ...FRESH, ...found, ...own }; // an older page wrote fewer fields
  }

  /** Replace the record and the account together. Throws ConfigError: they cannot be stored; those before stay. */
  async save({ privacy, maximum_epsilon, ...record }) {
    const own = { ...record, rounds: record.rounds.slice(0, MAX_ROUNDS) };
    await this.store.transact(IDENTITIES, [], () => [[ACCOUNT, { privacy, maximum_epsilon }], [this.place, own]]);
  }

  /** Whether `change` made another record of the one that is stored now, in the same transaction. Throws as `save`. */
  async #change(change) {
    let next;
    await this.store.transact(IDENTITIES, [this.place], (now) => {
      next = change(now);
      return next ? [[this.place, next]] : [];
    });
    return Boolean(next);
  }

  /** Delete the key and all that belongs to it. The account of what was revealed stays. */
  async forget() {
    await this.store.transact(IDENTITIES, [], () => [[this.place, undefined]]);
  }

  /** Make a key and a request for its certificate, and pin the authority's certificate and the coordinator's key, both PEM. Throws
   * ConfigError: there is an identity already, or no device can have the name. TrustError: a file is not sound. */
  async enrol({ device, authority, coordinator }) {
    if (await this.load()) throw new ConfigError("this browser has an identity already: forget it first", "identity");
    const der = certificateIn(authority, "the authority's certificate");
    await Root.open(der);
    const [{ raw }, ...more] = await pinned(coordinator, "the coordinator's key");
    if (more.length) throw new TrustError("the coordinator has one key, and the file has several", "coordinator");
    await this.#create(device, der, raw);
  }

  /** Enrol with an invitation at the authority's enrolment service: make a key, pin what the invitation names, and install the certificate;
   * or go on with the key that an earlier call left.
   *
   * Throws ConfigError: the token is no invitation, or not for this identity. TrustError: the authority refuses, or answers with something
   * else than the certificate. EdgeAdaptError: it cannot be reached. */
  async redeem(token, url) {
    const invitation = await readInvitation(token);
    const { device, authority, coordinator } = invitation;
    const record = (await this.load()) ?? (await this.#create(device, authority, coordinator));
    if (record.certificate) throw new ConfigError(ENROLLED, "identity");
    if (record.device !== device || !equal(record.authority, authority) || !equal(record.coordinator, coordinator)) {
      throw new ConfigError(`this browser's key is that of ${record.device}, and the token for another device or fleet: forget the key first`, "token");
    }
    if (!(await this.#install(record, await certified(url, invitation, record.request)))) throw new ConfigError(CHANGED, "identity");
  }

  async #create(device, authority, coordinator) {
    const pair = await signingKey();
    const asked = await request(pair, device);
    const record = { ...FRESH, device, pair, authority, coordinator, request: asked };
    if (!(await this.#change((now) => !now && record))) throw new ConfigError(CHANGED, "identity");
    return record;
  }

  /** Install the certificate, PEM, that the authority issued for the request. Throws TrustError, ConfigError. */
  async install(certificate) {
    const record = await this.load();
    if (!record) throw new ConfigError("make a key and a request first", "identity");
    if (record.certificate) throw new ConfigError(ENROLLED, "identity");
    if (!(await this.#install(record, certificateIn(certificate, "the certificate")))) throw new ConfigError(CHANGED, "identity");
  }

  /** A newer certificate from the authority's enrolment service, if this one ends soon, for `renew`: { record, der }; else null. Throws
   * TrustError: it has expired, or the authority refuses. EdgeAdaptError: the authority cannot be reached. */
  async renewal(url) {
    const record = await this.load();
    if (!record?.certificate) return null;
    const { certificate, authority, pair } = record;
    const { notBefore, notAfter } = await (await Root.open(authority)).verify(certificate);
    if (Date.now() > notAfter) {
      const clock = `the clock of this device says ${new Date().toISOString()}`;
      throw new TrustError(`the certificate has expired: forget this identity, and enrol with a new token; ${clock}`, "certificate.validity");
    }
    if (notAfter - Date.now() > LEFT * (notAfter - notBefore)) return null;
    return { record, der: await renewed(url, { certificate, key: pair.privateKey }) };
  }

  /** Whether the newer certificate took the place of the one in `record`, which may be gone. No tab may take part meanwhile. */
  renew({ record, der }) {
    return this.#install(record, der);
  }

  /** Whether the certificate was put in place of that of `record`; not if another tab changed the identity meanwhile. */
  async #install(record, der) {
    const { device, key } = await (await Root.open(record.authority)).verify(der, Date.now());
    const own = await publicKeyOf(record.pair);
    if (device !== record.device || !equal(key, own.raw)) {
      throw new TrustError(`the certificate is for another key or name: have the request of ${record.device} certified`, "certificate");
    }
    return this.#change((now) => {
      const isSame = now && now.request === record.request && String(now.certificate ?? null) === String(record.certificate);
      return isSame && { ...now, certificate: der };
    });
  }

  /** What a person may know of the record; null without one. */
  async shown() {
    const record = await this.load();
    if (!record) return null;
    const { device, request: asked, rounds, certificate, authority, coordinator, pair, privacy, maximum_epsilon: limit } = record;
    const root = await Root.open(authority);
    const [own, coordinators] = [await publicKeyOf(pair), (await sha256(coordinator)).slice(0, 16)];
    const until = certificate && (await root.verify(certificate)).notAfter;
    const { delta } = new Policy();
    const account = { epsilon: epsilonOf(spent(privacy), delta), delta, noisy: privacy.noisy, bare: privacy.bare, limit };
    const facts = { device, key: own.id, coordinator: coordinators, authority: await sha256(authority), until };
    return { ...facts, request: asked, rounds, privacy: account };
  }
}

/** A stored account. Throws TrustError: it is damaged. */
function requireAccount({ privacy, maximum_epsilon: limit }) {
  if (!(0 <= limit && limit < Infinity)) throw new TrustError("the limit on the privacy to spend is damaged; clear the page's data to start anew", "privacy");
  return { privacy: requireLedger(privacy), maximum_epsilon: limit };
}
