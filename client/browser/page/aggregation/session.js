// What every party of a session knows once the roster is out, as aggregation/session.py.

import { concat, digest, encode as utf8 } from "../bytes.js";
import { hararyNeighbors, hararyOrder } from "./graph.js";
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
