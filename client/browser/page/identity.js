// The identity of this browser as a device of a fleet, in IndexedDB: one record for each base, replaced as a whole.
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
//   privacy      what its contributions may have revealed (aggregation/privacyledger.js)
//   parts        of an adapter that it trains and does not share (learning/round.js); null at first
//   rounds       [{ at, round, version, outcome }], newest first; `at` in milliseconds
//
// Key and states are in one record, because a device with its key and without its states could be asked for a sum twice. What was
// revealed stays revealed: when the identity is forgotten, `privacy` stays as the only field.

import { epsilonOf } from "./aggregation/accounting.js";
import { Root } from "./aggregation/certificates.js";
import { Policy } from "./aggregation/policy.js";
import { EMPTY, requireLedger, spent } from "./aggregation/privacyledger.js";
import { certificateIn, request } from "./aggregation/requests.js";
import { equal, sha256 } from "./bytes.js";
import { ConfigError, TrustError } from "./errors.js";
import { certified, readInvitation, renewed } from "./invitation.js";
import { pinned, publicKeyOf, signingKey } from "./keys.js";
import { IDENTITIES, transact } from "./storage.js";

const MAX_ROUNDS = 100; // that are kept
const LEFT = 1 / 3; // of its validity: a certificate that has less left is renewed
const FRESH = { certificate: null, adapter: null, log: null, revocations: null, privacy: EMPTY, parts: null, rounds: [] };

export class Identity {
  /** `place` names the base. */
  constructor(place) {
    this.place = place;
  }

  /** The record; undefined without one. Throws ConfigError: the browser does not store. TrustError: it is damaged. */
  async load() {
    const found = await this.#stored();
    return found.pair && { ...FRESH, ...found };
  }

  /** What is stored, of which an older page wrote fewer fields. */
  async #stored() {
    const found = (await transact(IDENTITIES, "readonly", (store) => store.get(this.place))) ?? {};
    requireLedger(found.privacy ?? EMPTY);
    return found;
  }

  /** Replace the record. Throws ConfigError: it cannot be stored; the one before stays. */
  async save(record) {
    const rounds = record.rounds.slice(0, MAX_ROUNDS);
    await transact(IDENTITIES, "readwrite", (store) => store.put({ ...record, rounds }, this.place));
  }

  /** Delete the key and all that belongs to it, except the account of what was revealed. */
  async forget() {
    const { privacy = EMPTY } = await this.#stored();
    await transact(IDENTITIES, "readwrite", (store) => store.put({ privacy }, this.place));
  }

  /**
   * Make a key and a request for its certificate, and pin the authority's certificate and the coordinator's key, both PEM.
   *
   * Throws ConfigError: there is an identity already, or no device can have the name. TrustError: a file is not sound.
   */
  async enrol({ device, authority, coordinator }) {
    if (await this.load()) throw new ConfigError("this browser has an identity already: forget it first", "identity");
    const der = certificateIn(authority, "the authority's certificate");
    await Root.open(der);
    const [{ raw }, ...more] = await pinned(coordinator, "the coordinator's key");
    if (more.length) throw new TrustError("the coordinator has one key, and the file has several", "coordinator");
    await this.#create(device, der, raw);
  }

  /**
   * Enrol with an invitation at the authority's enrolment service: make a key, pin what the invitation names, and install the
   * certificate; or go on with the key that an earlier call left.
   *
   * Throws ConfigError: the token is no invitation, or not for this identity. TrustError: the authority refuses, or answers
   * with something else than the certificate. EdgeAdaptError: it cannot be reached.
   */
  async redeem(token, url) {
    const invitation = await readInvitation(token);
    const { device, authority, coordinator } = invitation;
    const record = (await this.load()) ?? (await this.#create(device, authority, coordinator));
    if (record.certificate) throw new ConfigError("this browser is enrolled already: forget its identity first", "identity");
    if (record.device !== device || !equal(record.authority, authority) || !equal(record.coordinator, coordinator)) {
      throw new ConfigError(`this browser's key is that of ${record.device}, and the token for another device or fleet: forget the key first`, "token");
    }
    await this.#install(record, await certified(url, invitation, record.request));
  }

  async #create(device, authority, coordinator) {
    const pair = await signingKey();
    const asked = await request(pair, device);
    const record = { ...FRESH, ...(await this.#stored()), device, pair, authority, coordinator, request: asked };
    await this.save(record);
    return record;
  }

  /** Install the certificate, PEM, that the authority issued for the request. Throws TrustError, ConfigError. */
  async install(certificate) {
    const record = await this.load();
    if (!record) throw new ConfigError("make a key and a request first", "identity");
    await this.#install(record, certificateIn(certificate, "the certificate"));
  }

  /**
   * Have the certificate renewed at the authority's enrolment service, if it ends soon. No tab may take part meanwhile.
   *
   * Throws TrustError: it has expired, or the authority refuses. EdgeAdaptError: the authority cannot be reached. The old one stays.
   */
  async renew(url) {
    const record = await this.load();
    if (!record?.certificate) return;
    const { certificate, authority, pair } = record;
    const { notBefore, notAfter } = await (await Root.open(authority)).verify(certificate);
    if (Date.now() > notAfter) throw new TrustError("the certificate has expired: forget this identity, and enrol with a new token", "certificate.validity");
    if (notAfter - Date.now() > LEFT * (notAfter - notBefore)) return;
    await this.#install(record, await renewed(url, { certificate, key: pair.privateKey }));
  }

  async #install(record, der) {
    const { device, key } = await (await Root.open(record.authority)).verify(der, Date.now());
    const own = await publicKeyOf(record.pair);
    if (device !== record.device || !equal(key, own.raw)) {
      throw new TrustError(`the certificate is for another key or name: have the request of ${record.device} certified`, "certificate");
    }
    await this.save({ ...record, certificate: der });
  }

  /** What a person may know of the record; null without one. */
  async shown() {
    const record = await this.load();
    if (!record) return null;
    const { device, request: asked, rounds, certificate, authority, coordinator, pair, privacy } = record;
    const root = await Root.open(authority);
    const [own, coordinators] = [await publicKeyOf(pair), (await sha256(coordinator)).slice(0, 16)];
    const until = certificate && (await root.verify(certificate)).notAfter;
    const { delta } = new Policy();
    const account = { epsilon: epsilonOf(spent(privacy), delta), delta, noisy: privacy.noisy, bare: privacy.bare };
    const facts = { device, key: own.id, coordinator: coordinators, authority: await sha256(authority), until };
    return { ...facts, request: asked, rounds, privacy: account };
  }
}
