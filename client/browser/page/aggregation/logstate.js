// What a device knows of the coordinator's log, and what it requires of it before it takes part again, as
// aggregation/transcript/logstate.py. The log state is in memory, as long as the identity key that it belongs to.
// Proofs about the Merkle tree of the log (RFC 9162, section 2.1) are as aggregation/transcript/merkle.py; sizes are BigInts.

import { concat, digest, encode as utf8, equal, hex } from "../bytes.js";
import { ProtocolError, TrustError } from "../errors.js";
import { COORDINATOR, DEVICE_ID, MAX_COHORT, OVERHEAD, message, openVerified, refuse } from "./messages.js";
import { HEX, MAX_ROUNDS } from "./spec.js";
import { blob, choice, decode, fixed, last, mapping, record, sequence, text, uint, uint64 } from "./wire.js";

const MIB = 2 ** 20;
const DIGEST = fixed(32);
const PATH = sequence(fixed(32), 128);

const Result = message("result", 4 * MIB, {
  plan: DIGEST,
  survivors: sequence(text(DEVICE_ID), MAX_COHORT),
  sum: DIGEST,
  version: uint64,
  adapter: HEX,
});
const Abort = message("abort", 1024, { plan: DIGEST, reason: text("[a-z-]{1,32}") });
const Checkpoint = message("checkpoint", 1024, {
  offer: DIGEST,
  size: uint64,
  root: DIGEST,
  previous: DIGEST,
  version: uint64,
  adapter: HEX,
  stage: choice("open", "closed"),
});
const ENTRY = record({
  index: uint64,
  kind: text("[a-z-]{1,32}"),
  round: uint(32),
  peer: text(`\\*|${DEVICE_ID}`),
  message: blob(2 ** 29),
  at: last(uint(32)),
});
const CHECKPOINT = blob(Checkpoint.limit + OVERHEAD);
const PROOFS = sequence(record({ leaf: blob(Result.limit + 2 * OVERHEAD + 64 * MAX_COHORT), path: PATH }), MAX_ROUNDS);
const RECEIPT = record({
  checkpoint: CHECKPOINT,
  endings: PROOFS,
  contributions: PROOFS,
  consistency: mapping(uint64, PATH, 2 * MAX_ROUNDS),
});
const SESSION_CHAIN_PROOF = record({ receipt: blob(2 ** 28), closed: sequence(CHECKPOINT, 10_000), start: CHECKPOINT });

const openCheckpoint = (raw, coordinator) => openVerified(Checkpoint, raw, coordinator, COORDINATOR);

/** SHA-256 of the sorted device ids: equal for equal sets. */
const digestOf = (devices) => digest(utf8([...devices].sort().join("\n")));

/** What a device knows of the log of the session that it joined last: its own id; `offer` and `previous`, the digests of that session's
 * offer and of the last checkpoint before it; `version` and `adapter`, the newest in the log; `size` and `root` when it saw proofs last;
 * and of its last round the digest of the plan, of its messages and of the survivors that were named. */
export class LogState {
  constructor(known) {
    Object.assign(this, { size: 0n, root: null, plan: null, unconfirmed: null, delivered: [], survivors: null }, known);
    Object.freeze(this);
  }

  /** The state of a device that has none, from the proof sent with the offer of this digest. */
  static async initial(coordinator, raw, offer, device) {
    const proof = decode(SESSION_CHAIN_PROOF, raw);
    const start = await openCheckpoint(proof.start, coordinator);
    if (!equal(start.offer, offer) || start.size !== 0n || start.stage !== "open") {
      refuse("the session chain proof is for another session than the offer", "proof.start");
    }
    return new LogState({ device, offer, previous: start.previous, version: start.version, adapter: start.adapter });
  }

  /** The state after the device answered the plan with this digest by a signed message. */
  async contributed(plan, answer) {
    return new LogState({ ...this, plan, unconfirmed: await digest(answer), delivered: [], survivors: null });
  }

  /** The state after the coordinator named the survivors, which shows that the device's last message arrived. */
  async onSurvivors(survivors, answer = null) {
    const delivered = this.unconfirmed === null ? this.delivered : [...this.delivered, this.unconfirmed];
    const unconfirmed = answer === null ? null : await digest(answer);
    return new LogState({ ...this, delivered, unconfirmed, survivors: await digestOf(survivors) });
  }

  /** The state to keep after a receipt. Throws ProtocolError: it does not prove that the log extends what this device saw, has its
   * delivered messages, and ended its round with the survivors that it was shown; or its newest adapter is not the one that this device
   * knows, or that the results since then made from it. */
  async onReceipt(coordinator, raw) {
    return (await this.#checked(coordinator, raw))[0];
  }

  requireNewest({ adapter_version: version, adapter_digest: adapter }) {
    if (version === this.version && adapter === this.adapter) return;
    refuse(`adapter ${version} of the plan is not the newest one in the log, ${this.version}`, "plan.adapter");
  }

  /** The state to keep after the proof sent with the offer of this digest: the new session follows the log that is known. `otherBase`: it is
   * on another base than the last one in which the device trained, and may start from a newer adapter than any that the log made. */
  async onSessionChainProof(coordinator, raw, offer, otherBase = false) {
    const proof = decode(SESSION_CHAIN_PROOF, raw);
    if (equal(offer, this.offer)) refuse("this device has joined that session before: the offer is repeated", "offer.repeated");
    if (!proof.receipt.length) refuse("the proof has no receipt for the session that this device joined last", "proof.receipt");
    let last = closed((await this.#checked(coordinator, proof.receipt))[1]);
    for (const signed of proof.closed) {
      const link = closed(await openCheckpoint(signed, coordinator));
      if (!equal(link.previous, await Checkpoint.digest(last))) {
        refuse("the proof omits a session between the last one and this one", "proof.closed");
      }
      if (link.version < last.version || (link.version === last.version && link.adapter !== last.adapter)) {
        refuse("a session that this device missed ended with an older or another adapter than it began with", "proof.adapter");
      }
      last = link;
    }
    const fresh = await LogState.initial(coordinator, raw, offer, this.device);
    if (!equal(fresh.previous, await Checkpoint.digest(last))) {
      refuse("the offer does not follow the last session that this device knows: it is old", "proof.previous");
    }
    const same = fresh.version === last.version && fresh.adapter === last.adapter;
    if (!same && !(otherBase && fresh.version > last.version)) {
      refuse("the session starts from another adapter than the session before it ended with", "proof.adapter");
    }
    return fresh;
  }

  async #checked(coordinator, raw) {
    const receipt = decode(RECEIPT, raw);
    const checkpoint = await openCheckpoint(receipt.checkpoint, coordinator);
    if (!equal(checkpoint.offer, this.offer) || !equal(checkpoint.previous, this.previous)) {
      refuse("the log is of another session", "receipt.session");
    }
    await ProtocolError.blaming(COORDINATOR, TrustError, async () => {
      if (this.size) {
        const path = receipt.consistency.get(this.size) ?? [];
        await verifyConsistency(this.root, this.size, checkpoint.root, checkpoint.size, path);
      }
      const endings = await endingsIn(coordinator, receipt, checkpoint);
      await this.#checkLastRound(receipt, endings, checkpoint);
      this.#checkAdapter(endings, checkpoint);
    });
    const { device, offer, previous } = this;
    const { version, adapter, size, root } = checkpoint;
    return [new LogState({ device, offer, previous, version, adapter, size, root }), checkpoint];
  }

  /** Returns if a receipt shows the end of the device's last round and the messages that it must contain. */
  async #checkLastRound(receipt, endings, checkpoint) {
    if (this.plan === null) return;
    const ending = endings.find(({ plan }) => equal(plan, this.plan));
    if (!ending) refuse("the receipt does not show how this device's last round ended", "receipt.endings");
    const required = new Set(this.delivered.map(hex));
    if (ending.survivors) {
      if (this.survivors !== null && !equal(this.survivors, await digestOf(ending.survivors))) {
        refuse("the log names other survivors than this device was shown", "receipt.survivors");
      }
      const counted = ending.survivors.includes(this.device);
      if (counted && this.unconfirmed !== null && this.survivors === null) required.add(hex(this.unconfirmed));
    }
    for (const proof of receipt.contributions) required.delete(hex(await digest((await included(proof, checkpoint)).message)));
    if (!required.size) return;
    refuse("the receipt does not show that the log has this device's messages of its last round", "receipt.contributions");
  }

  /** Returns if the results since the checkpoint that a device knows lead from its newest adapter to the log's. */
  #checkAdapter(endings, checkpoint) {
    let { version, adapter } = this;
    for (const result of endings.filter(({ survivors }) => survivors)) {
      if (result.version === version + 1n) ({ version, adapter } = result);
      else if (result.version === version && result.adapter !== adapter) {
        refuse(`the log has two results for adapter ${version}`, "receipt.adapter");
      }
    }
    if (checkpoint.version === version && checkpoint.adapter === adapter) return;
    refuse(`the log names adapter ${checkpoint.version} as its newest, its results show ${version}`, "receipt.adapter");
  }
}

/** The endings that a receipt shows, verified, in the order of the log. */
async function endingsIn(coordinator, receipt, checkpoint) {
  const entries = [];
  for (const proof of receipt.endings) entries.push(await included(proof, checkpoint));
  entries.sort((a, b) => (a.index < b.index ? -1 : Number(a.index > b.index)));
  const found = [];
  for (const entry of entries) {
    found.push(await openVerified(entry.kind === Result.tag ? Result : Abort, entry.message, coordinator, COORDINATOR));
  }
  return found;
}

function closed(checkpoint) {
  if (checkpoint.stage !== "closed") refuse("the log of an earlier session is not closed", "proof.stage");
  return checkpoint;
}

async function included({ leaf, path }, checkpoint) {
  const entry = decode(ENTRY, leaf);
  await verifyInclusion(checkpoint.root, checkpoint.size, entry.index, leaf, path);
  return entry;
}

const node = (left, right) => digest(concat([1], left, right)); // section 2.1.1: no leaf hash can be a node hash

/** Returns if `path` proves that `entry` is leaf `index` of the tree of `size` leaves with this root (section 2.1.3.2). */
async function verifyInclusion(root, size, index, entry, path) {
  const text = `the proof does not show that entry ${index} is in the log of ${size} entries`;
  require(index < size, text, "log.inclusion");
  let found = await digest(concat([0], entry));
  for (const [isLeft, step] of climb(index, size - 1n, path, text, "log.inclusion")) {
    found = await (isLeft ? node(step, found) : node(found, step));
  }
  require(equal(found, root), text, "log.inclusion");
}

/** Returns if `path` proves that the tree of `old` leaves is a prefix of that of `size` leaves (section 2.1.4.2). */
async function verifyConsistency(oldRoot, old, root, size, path) {
  const text = `the proof does not show that the log of ${size} entries begins with the ${old} entries seen before`;
  const about = "log.consistency";
  require(0n < old && old <= size, text, about);
  if (old === size) return require(!path.length && equal(oldRoot, root), text, about);
  const [start, ...steps] = old & (old - 1n) ? path : [oldRoot, ...path];
  require(start, text, about);
  let [at, last] = [old - 1n, size - 1n];
  while (at & 1n) [at, last] = [at >> 1n, last >> 1n];
  let [first, second] = [start, start];
  for (const [isLeft, step] of climb(at, last, steps, text, about)) {
    if (isLeft) first = await node(step, first);
    second = await (isLeft ? node(step, second) : node(second, step));
  }
  require(equal(first, oldRoot) && equal(second, root), text, about);
}

/** The steps of a proof from node `at` of a level up to the root, and whether each is the left neighbor. */
function* climb(at, last, path, text, about) {
  for (const step of path) {
    require(last !== 0n, text, about);
    const isLeft = Boolean(at & 1n) || at === last;
    yield [isLeft, step];
    while (isLeft && !(at & 1n) && at) [at, last] = [at >> 1n, last >> 1n];
    [at, last] = [at >> 1n, last >> 1n];
  }
  require(last === 0n, text, about);
}

function require(holds, text, about) {
  if (!holds) throw new TrustError(text, about);
}
