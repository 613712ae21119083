// The device's side of the protocol, as aggregation/client.py: one class for each state, whose methods are the legal steps.
//
//   join → Advertised → Ready → Planned → Masked → Confirmed → Ready …
//                                         Masked ───────────→ Ready …      (honest-but-curious)
//
// Each step checks the message (checks.js), then returns the next state and the answer. A refused message throws
// ProtocolError and leaves the state as it is. A state answers once, also where two messages arrive at the same time.
// Secrets are private fields: nothing that prints, copies or serializes a state shows them. States are kept in memory only,
// so a closed page counts as a dropped out device.

import { digest, encode as utf8, equal } from "../bytes.js";
import { ProtocolError, TrustError } from "../errors.js";
import * as checks from "./checks.js";
import { commitment, maskPeers } from "./checks.js";
import { pack, requireVector } from "./contribution.js";
import { KEY, apply, deal, decrypt, derivable, derive, derivedEntropy, exchangeKey, pairKey, publicKey, selfKey, systemEntropy } from "./masks.js";
import * as m from "./messages.js";
import { ACTIVE, HONEST_BUT_CURIOUS, sizeOf } from "./spec.js";

/** The identity of a device, and what it relies on: { key, publicKey, certificate, root, coordinator, policy }. `key` is its Ed25519
 * CryptoKey, which need not be exportable, with its public half of 32 bytes; `certificate` is DER; `root` is the pinned authority
 * (certificates.js); `coordinator` the pinned public key, 32 bytes. */
export class Device {
  #key;

  constructor({ key, publicKey: own, certificate, root, coordinator, policy }) {
    Object.assign(this, { publicKey: own, certificate, root, coordinator, policy });
    this.#key = key;
    Object.freeze(this);
  }

  withRoot(root) {
    return new Device({ ...this, key: this.#key, root });
  }

  open(kind, raw) {
    return m.openVerified(kind, raw, this.coordinator, m.COORDINATOR);
  }

  sign(kind, value) {
    return m.sign(this.#key, kind, value);
  }

  /** The signature on the gateway's nonce and the name of its host (`verify_challenge` of aggregation/pki/tls.py). */
  signChallenge(challenge) {
    return m.signature(this.#key, "gateway-challenge", challenge);
  }
}

/** A state: what is `known` in it, as fields, and secrets. It produces its answer once: the second attempt is refused. */
class State {
  #taken = false;
  #secrets;

  constructor(known, secrets) {
    Object.assign(this, known);
    this.#secrets = secrets;
    Object.freeze(this);
  }

  secrets() {
    return this.#secrets;
  }

  take(what) {
    if (this.#taken) throw new ProtocolError(`this state has already produced its ${what}; a step is answered once`, "single-use");
    this.#taken = true;
  }
}

/** The answer to a challenge (step 0). `node`: Flower's id of this node, a BigInt; `lastOffer`: a digest, or null. */
export async function checkIn(device, challenge, node, lastOffer = null) {
  const message = await device.open(m.Challenge, challenge);
  if (message.node !== node) {
    const text = `the challenge is for node ${message.node}, this device runs as node ${node}`;
    m.refuse(text, "challenge.node");
  }
  return device.sign(m.CheckIn, {
    challenge: await m.Challenge.digest(message),
    certificate: device.certificate,
    last_offer: lastOffer,
  });
}

/** Accepts an offer (step 2) and makes the keys of every round: the state and the advert. `at`: now in ms, or null. */
export async function join(device, offer, entropy = systemEntropy, at = null) {
  const message = await device.open(m.Offer, offer);
  const [me, cohort] = await findSelf(device, message, at);
  const [offered, { rounds }] = [await m.Offer.digest(message), message.spec];
  const drawn = await entropy(KEY);
  const [shareKey, dealing] = [await exchangeKey(drawn), await derivable(drawn)];
  drawn.fill(0);
  const advert = { offer: offered, device: me, share_key: await publicKey(shareKey), mask_keys: [], commitments: [] };
  const secrets = [];
  for (let round = 1; round <= rounds; round++) {
    const [maskKey, seed] = [await entropy(KEY), await entropy(KEY)];
    secrets.push({ maskKey, seed });
    advert.mask_keys.push(await publicKey(await exchangeKey(maskKey)));
    advert.commitments.push(await commitment(seed, offered, me, round));
  }
  const signed = await device.sign(m.Advert, advert);
  const known = { me, spec: message.spec, offer: offered, cohort, ends: checks.sessionEnd(device.root, cohort), advert: signed };
  return [new Advertised(known, { shareKey, dealing, secrets }), signed];
}

async function findSelf(device, offer, at) {
  const cohort = await checks.members(device.root, offer.certificates, device.coordinator, at);
  device.policy.check(offer.spec, cohort.size);
  let own;
  try {
    own = await device.root.verify(device.certificate, at);
  } catch (error) {
    if (!(error instanceof TrustError)) throw error;
    throw new ProtocolError(`this device's own certificate: ${error.message}`, "device.certificate");
  }
  if (!equal(own.key, device.publicKey) || !equal(cohort.get(own.device)?.key ?? [], own.key)) {
    m.refuse("offer does not include this device with its own key", "offer.self");
  }
  return [own.device, cohort];
}

/** The advert is sent; the roster is next. */
class Advertised extends State {
  /** Checks the roster and shares the secrets of every round (steps 3 and 4): the state and the encrypted shares. Without `entropy` the
   * polynomials follow from the share key and the roster, as the protocol has it. The bytes of the secrets are overwritten; what stays
   * of this device's own are keys that cannot be exported. */
  async onRoster(device, roster, entropy = null) {
    const { me, spec, offer, cohort, ends } = this;
    const message = await device.open(m.Roster, roster);
    const [session, adverts] = await checks.roster(spec, offer, cohort, message);
    device.policy.checkRoster(spec, cohort.size, adverts.size);
    if (!equal(adverts.get(me) ?? [], this.advert)) m.refuse("roster does not have this device's own advert", "roster.self");
    this.take("shares");
    const { shareKey, dealing, secrets } = this.secrets();
    const content = await digest(m.Roster.encode(message));
    entropy ??= derivedEntropy(await derive(dealing, "AES-CTR", utf8("edgeadapt/dealing/1"), content));
    const [own, encrypted] = await deal(session, me, shareKey, secrets, entropy);
    const shares = await device.sign(m.Shares, { context: session.context, device: me, encrypted_shares: encrypted });
    const rounds = new Map();
    for (const [i, { maskKey, seed }] of secrets.entries()) {
      const keys = { maskKey: await exchangeKey(maskKey), seed: await derivable(seed) };
      maskKey.fill(0);
      seed.fill(0);
      rounds.set(i + 1, { ...keys, held: new Map([[me, own[i]]]) });
    }
    const serials = new Map([...cohort].map(([name, { serial }]) => [name, serial]));
    return [new Ready({ session, me, ends, serials, lastRound: 0, dealers: null }, { shareKey, rounds }), shares];
  }
}

/** Between rounds. `ends`: see `checks.sessionEnd`; `serials`: a Map of device → serial of its certificate, of the whole cohort;
 * `lastRound`: the last one begun, 0 before the first; `dealers`: the Set of devices whose shares arrived, null before. The secrets are
 * the share key, until then, and `rounds`, a Map of round → { maskKey, seed, held }, of rounds still to come. */
class Ready extends State {
  /** Accepts the plan of a round (step 5). Skipped rounds can no longer be joined; their secrets are dropped. */
  async onPlan(device, assignment, at = null) {
    const { plan, encrypted_shares: shares } = await device.open(m.Assignment, assignment);
    checks.beforeEnd(this.ends, at);
    const [rounds, dealers] = this.dealers ? [this.secrets().rounds, this.dealers] : [await this.#decrypt(shares), new Set(shares.keys())];
    await checks.plan(this.session, this.me, dealers, this.lastRound, plan);
    this.take("round");
    const later = new Map([...rounds].filter(([round]) => round > plan.round));
    const next = new Ready({ ...this, lastRound: plan.round, dealers }, { rounds: later });
    return new Planned({ ready: next, plan }, rounds.get(plan.round));
  }

  async #decrypt(shares) {
    checks.encryptedShares(this.session, this.me, shares);
    const { shareKey, rounds: own } = this.secrets();
    const rounds = new Map([...own].map(([round, secrets]) => [round, { ...secrets, held: new Map(secrets.held) }]));
    for (const [dealer, encrypted] of shares) {
      const pairs = (await decrypt(this.session, shareKey, dealer, this.me, encrypted)) ?? [];
      pairs.forEach((pair, i) => rounds.get(i + 1).held.set(dealer, pair));
    }
    return rounds;
  }
}

/** A state within a round: { ready, plan, … }, and secrets of the round. */
class InRound extends State {
  onPlan(device, assignment, at = null) {
    return this.ready.onPlan(device, assignment, at);
  }
}

class Planned extends InRound {
  get spec() {
    return this.ready.session.spec;
  }

  /** Masks and signs the vector (step 6), a ring vector that is overwritten: the state and the masked input. */
  async contribute(device, vector) {
    const { ready, plan } = this;
    const [bits, planned] = [this.spec.vector.ring_bits, await m.Plan.digest(plan)];
    requireVector(vector, sizeOf(this.spec.vector), bits);
    this.take("masked-input");
    await apply(vector, await this.#masks(planned));
    const packed = pack(vector, bits);
    const header = { plan: planned, device: ready.me, vector: await digest(packed) };
    const signed = await device.sign(m.MaskedInput, header);
    return [new Masked({ ready, plan, vector: header.vector }, this.secrets().held), m.withVector(packed, signed)];
  }

  async #masks(planned) {
    const { session, me } = this.ready;
    const { maskKey, seed } = this.secrets();
    const masks = [{ key: await selfKey(seed, session.context, planned, me), add: true }];
    for (const peer of await maskPeers(session, this.plan, me)) {
      const raw = session.peers.get(peer).maskKeys[this.plan.round - 1];
      masks.push({ key: await pairKey(maskKey, raw, session.context, planned, [me, peer]), add: me < peer });
    }
    return masks;
  }
}

/** The masked input is sent; the survivor set is next. `vector`: digest of the sent vector. */
class Masked extends InRound {
  /** Checks the survivor set and signs it, once (step 7): the state and the consistency signature. */
  async onSurvivors(device, survivors) {
    this.#requireAdversary(ACTIVE, "survivor set");
    const message = await device.open(m.Survivors, survivors);
    const { session, me } = this.ready;
    await checks.survivors(session, this.plan, me, this.vector, message);
    this.take("consistency-signature");
    const signed = await m.Survivors.digest(message);
    const answer = await device.sign(m.ConsistencySignature, { survivors: signed, device: me });
    return [new Confirmed({ ready: this.ready, plan: this.plan, survivors: message, signed }, this.secrets()), answer];
  }

  /** Reveals shares for a survivor set without a consistency check (step 8, honest-but-curious sessions only). */
  async onUnmask(device, unmask) {
    this.#requireAdversary(HONEST_BUT_CURIOUS, "unmask request without consistency signatures");
    const { survivors } = await device.open(m.Unmask, unmask);
    await checks.survivors(this.ready.session, this.plan, this.ready.me, this.vector, survivors);
    return revealed(device, this, survivors);
  }

  #requireAdversary(expected, what) {
    const { adversary } = this.ready.session.spec;
    if (adversary === expected) return;
    m.refuse(`a session against an ${adversary} coordinator has no step with a ${what}`, "session.adversary");
  }
}

/** This device signed a survivor set; the signatures of the others are next. */
class Confirmed extends InRound {
  /** Reveals shares for the survivor set that this device signed (step 8). The shares of the round are dropped. */
  async onUnmask(device, unmask) {
    const { survivors, consistency_signatures: signatures } = await device.open(m.Unmask, unmask);
    if (!equal(await m.Survivors.digest(survivors), this.signed)) {
      m.refuse("unmask request is for another survivor set than this device signed", "unmask.survivors");
    }
    await checks.consistencySignatures(this.ready.session, this.plan, survivors, signatures);
    return revealed(device, this, survivors);
  }
}

/** The state after an unmask response: one kind of share for each dealer, of the seed of a survivor, of the mask key of a dropout. */
async function revealed(device, state, survivors) {
  state.take("unmask-response");
  const [{ ready, plan }, held] = [state, state.secrets()];
  const [seeds, keys] = [new Map(), new Map()];
  for (const dealer of [ready.me, ...ready.session.neighbors(ready.me, plan.members)]) {
    if (!held.has(dealer)) continue;
    if (survivors.vectors.has(dealer)) seeds.set(dealer, held.get(dealer).seed);
    else keys.set(dealer, held.get(dealer).key);
  }
  return [ready, await device.sign(m.UnmaskResponse, { survivors: await m.Survivors.digest(survivors), device: ready.me, seeds, keys })];
}
