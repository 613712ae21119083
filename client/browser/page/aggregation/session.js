// What every party of a session knows once the roster is out, as aggregation/session.py; and the devices of a round in several sums,
// as aggregation/groups.py.

import { concat, digest, encode as utf8, hex, unhex } from "../bytes.js";
import { ProtocolError } from "../errors.js";
import { hararyNeighbors, hararyOrder } from "./graph.js";
import { COORDINATOR } from "./messages.js";
import { u32 } from "./wire.js";

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
  const places = [];
  for (const device of [...members, ...former]) {
    places.push([hex(await digest(concat(utf8("edgeadapt/group/1\0"), unhex(adapter), utf8(device)))), device]);
  }
  places.sort(([a], [b]) => (a < b ? -1 : 1));
  return new Map(places.map(([, device], place) => [device, place % grouping.count]));
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
    throw new ProtocolError(text, about, COORDINATOR);
  }
}
