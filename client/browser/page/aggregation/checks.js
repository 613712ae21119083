// The checks of a device, as aggregation/checks.py, session.py and groups.py: everything it requires of a message before it acts on it.
// Each throws ProtocolError, about the same field as there. Rules by step of docs/reference/protocol.md.

import { concat, digest, encode as utf8, equal, hex, unhex } from "../bytes.js";
import { ConfigError, ProtocolError, TrustError } from "../errors.js";
import { digestOrder, hararyNeighbors, hararyOrder } from "./graph.js";
import { requirePublicKey } from "./masks.js";
import { Advert, COORDINATOR, ConsistencySignature, Plan, Roster, Survivors, openVerified, refuse, unverifiedBody, verify } from "./messages.js";
import { quorumOf } from "./spec.js";
import { ascending, u32 } from "./wire.js";

/** The ids and keys of a cohort: a Map of device → { key, serial, notAfter }. `coordinator`: its key, which is no device's. */
export async function members(root, certificates, coordinator, at) {
  const found = [];
  for (const der of certificates) found.push(await ProtocolError.blaming("", TrustError, () => root.verify(der, at)));
  const names = found.map(({ device }) => device);
  if (!ascending(names)) throw new ProtocolError("the cohort repeats a device, or is out of order", "offer.order");
  if (new Set(names.map((name) => name.toLowerCase())).size !== names.length) {
    throw new ProtocolError("two device ids of the cohort differ in upper and lower case only", "offer.names");
  }
  if (new Set([coordinator, ...found.map(({ key }) => key)].map(hex)).size !== 1 + names.length) {
    throw new ProtocolError("two devices of the cohort, or one and the coordinator, have the same key", "offer.keys");
  }
  return new Map(found.map(({ device, ...rest }) => [device, rest]));
}

/** When a session ends: with the first to expire of its cohort's certificates, the authority's own and its list. */
export function sessionEnd(root, cohort) {
  const times = Array.from(cohort.values(), ({ notAfter }) => notAfter);
  return Math.min(root.authority.notAfter, root.revoked?.nextUpdate ?? Infinity, ...times);
}

/** Returns if a session that ends at `ends` may begin a round at `at`; null: the device has no clock it trusts. */
export function beforeEnd(ends, at) {
  if (at === null || at <= ends) return;
  const text = `the session ended on ${new Date(ends).toISOString()}, when a certificate or the revocation list expired`;
  refuse(text, "plan.time");
}

async function advert(offer, rounds, signer, device, raw) {
  const message = await openVerified(Advert, raw, signer, device);
  if (!equal(message.offer, offer)) throw new ProtocolError("advert message is for another offer", "advert.offer", device);
  if (message.device !== device) throw new ProtocolError(`advert message names ${message.device}`, "advert.device", device);
  if (message.mask_keys.length !== rounds || message.commitments.length !== rounds) {
    throw new ProtocolError(`advert does not have keys and commitments for ${rounds} rounds`, "advert.mask_keys", device);
  }
  const keys = [message.share_key, ...message.mask_keys];
  if (new Set(keys.map(hex)).size !== keys.length) throw new ProtocolError("advert repeats a key", "advert.keys", device);
  await ProtocolError.blaming(device, Error, () => keys.forEach(requirePublicKey));
  return message;
}

/** The session that a roster defines, and a Map of device → advert as signed. */
export async function roster(spec, offer, cohort, message) {
  if (!equal(message.offer, offer)) refuse("roster is for another offer", "roster.offer");
  enoughDevices(spec, message.adverts.length, "adverts on the roster", "roster.size");
  const [signed, peers, keys] = [new Map(), new Map(), new Set()];
  let last = "";
  for (const raw of message.adverts) {
    // Whose advert it claims to be; `advert` then requires that device's signature.
    const { device } = Advert.decode(unverifiedBody(raw));
    const identity = cohort.get(device)?.key;
    if (!identity) refuse(`${device} is on the roster but not in the cohort`, "roster.members");
    if (device <= last) refuse(`${device} is repeated on the roster, or out of order`, "roster.order");
    const found = await advert(offer, spec.rounds, identity, device, raw);
    for (const key of [found.share_key, ...found.mask_keys].map(hex)) {
      if (keys.has(key)) refuse(`${device} has a key of another device on the roster`, "roster.keys");
      keys.add(key);
    }
    signed.set(device, raw);
    peers.set(device, { position: peers.size + 1, identity, shareKey: found.share_key, maskKeys: found.mask_keys });
    last = device;
  }
  const digested = await Roster.digest(message);
  return [await ProtocolError.blaming(COORDINATOR, ConfigError, () => Session.of(spec, offer, digested, peers)), signed];
}

/** Returns if the encrypted shares that a device receives are from neighbors only, and enough for a round. */
export function encryptedShares(session, me, received) {
  const near = new Set(session.neighbors(me, session.peers.keys()));
  for (const dealer of received.keys()) {
    if (!near.has(dealer)) refuse(`shares of ${dealer}, which is not a neighbor`, "assignment.dealers");
  }
  enoughNeighbors(session, me, received.keys(), "sent it shares", "assignment.neighbors");
}

/** Returns if a device may act on a plan. `dealers`: the Set of devices whose shares it has. */
export async function plan(session, me, dealers, lastRound, message) {
  const { context, round, members: named } = message;
  if (!equal(context, session.context)) refuse("plan is for another session", "plan.context");
  if (round <= lastRound || round > session.spec.rounds) {
    refuse(`round ${round} is not between ${lastRound + 1} and ${session.spec.rounds}`, "plan.round");
  }
  if (!ascending(named)) refuse("plan repeats a member, or is out of order", "plan.order");
  if (!named.includes(me)) refuse("plan does not include this device", "plan.self");
  const without = [
    ...named.filter((device) => !session.peers.has(device)),
    ...session.neighbors(me, named).filter((device) => !dealers.has(device)),
  ];
  if (without.length) refuse(`${without.sort()[0]} is in the plan, but this device has no shares of it`, "plan.members");
  enoughDevices(session.spec, named.length, "members of the plan", "plan.size");
  enoughNeighbors(session, me, named, "are in the plan", "plan.neighbors");
  const { former } = message;
  if (former.length && session.spec.grouping === null) refuse("plan names former members without groups", "plan.former");
  if (!ascending(former) || former.some((device) => named.includes(device))) {
    refuse("plan repeats a former member, has it out of order, or also as a member", "plan.former");
  }
  await requireMinimum(session.spec, message, named, "members of the plan", "plan.group");
}

/** Returns if a device may sign and unmask a survivor set. `vector`: digest of its own masked vector. */
export async function survivors(session, current, me, vector, message) {
  if (!equal(message.plan, await Plan.digest(current))) refuse("survivor set is for another plan", "survivors.plan");
  const planned = new Set(current.members);
  const stranger = [...message.vectors.keys()].find((device) => !planned.has(device));
  if (stranger) refuse(`survivor ${stranger} is not in the plan`, "survivors.members");
  if (!equal(message.vectors.get(me) ?? [], vector)) refuse("survivor set does not include this device with its own vector", "survivors.self");
  enoughDevices(session.spec, message.vectors.size, "survivors", "survivors.size");
  enoughNeighbors(session, me, message.vectors.keys(), "survived", "survivors.neighbors");
  await requireMinimum(session.spec, current, message.vectors.keys(), "survivors", "survivors.group");
}

/** Returns if a quorum of survivors, and of each group its minimum, signed this set: `signatures` is a Map of device → signature. */
export async function consistencySignatures(session, current, message, signatures) {
  const quorum = quorumOf(session.spec);
  const stranger = [...signatures.keys()].find((device) => !message.vectors.has(device));
  if (stranger) refuse(`${stranger} signed the survivor set but is not in it`, "unmask.signers");
  if (signatures.size < quorum) refuse(`${signatures.size} consistency signatures, ${quorum} are needed`, "unmask.quorum");
  await requireMinimum(session.spec, current, signatures.keys(), "consistency signatures", "unmask.group");
  const signed = await Survivors.digest(message);
  for (const [device, signature] of signatures) {
    const body = ConsistencySignature.encode({ survivors: signed, device });
    const { identity } = session.peers.get(device);
    await ProtocolError.blaming(COORDINATOR, Error, () => verify(identity, ConsistencySignature.tag, body, signature));
  }
}

function enoughDevices(spec, count, what, about) {
  const least = Math.max(spec.threshold, spec.minimum_survivors);
  if (count < least) refuse(`${count} ${what}, ${least} are needed`, about);
}

function enoughNeighbors(session, me, present, what, about) {
  const [count, least] = [1 + session.neighbors(me, present).length, session.spec.threshold];
  if (count >= least) return;
  refuse(`${count} devices of this device's neighborhood ${what}, ${least} are needed`, about);
}

/** The public state of a session: `peers` is a Map of device → { position, identity, shareKey, maskKeys }, ascending. */
export class Session {
  #neighbors;

  constructor(spec, offer, context, peers, neighbors) {
    Object.assign(this, { spec, offer, context, peers });
    this.#neighbors = neighbors;
    Object.freeze(this);
  }

  /** Throws ConfigError: no graph of the spec's degree exists on so many devices. */
  static async of(spec, offer, roster, peers) {
    const context = await digest(concat(utf8("edgeadapt/context/1\0"), offer, roster));
    const sparse = spec.degree < peers.size - 1;
    const neighbors = sparse ? hararyNeighbors(await hararyOrder(context, peers.keys()), spec.degree) : null;
    return new Session(spec, offer, context, peers, neighbors);
  }

  /** The devices of `among` with which `device` shares masks and secrets, in the given order. */
  neighbors(device, among) {
    const near = this.#neighbors?.get(device);
    return [...among].filter((other) => (near ? near.has(other) : other !== device));
  }
}

/** A device's commitment to its seed of a round. */
export function commitment(seed, offer, device, round) {
  return digest(concat(utf8("edgeadapt/commitment/1\0"), offer, u32(round), utf8(`${device}\0`), seed));
}

/** A Map of device → its group, from 0, for the members of a plan and its former ones; null in a session without groups. */
async function groupsOf({ grouping }, { adapter_digest: adapter, members, former }) {
  if (grouping === null) return null;
  const order = await digestOrder("edgeadapt/group/1\0", unhex(adapter), [...members, ...former]);
  return new Map(order.map((device, place) => [device, place % grouping.count]));
}

/** The devices with which `device` masks: its neighbors among the members of the plan or, with groups, those of its group. */
export async function maskPeers(session, plan, device) {
  const groups = await groupsOf(session.spec, plan);
  if (groups === null) return session.neighbors(device, plan.members);
  return plan.members.filter((other) => other !== device && groups.get(other) === groups.get(device));
}

/** Returns if each group has its minimum of devices that are `present`; else throws ProtocolError. */
export async function requireMinimum(spec, plan, present, what, about) {
  const groups = await groupsOf(spec, plan);
  if (groups === null) return;
  const counts = new Array(spec.grouping.count).fill(0);
  for (const device of present) counts[groups.get(device)]++;
  for (const [number, count] of counts.entries()) {
    if (count >= spec.grouping.minimum) continue;
    const text = `group ${number + 1} has ${count} ${what}, ${spec.grouping.minimum} are needed`;
    refuse(text, about);
  }
}
