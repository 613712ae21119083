// This browser as a device in the rounds of a federation: its identity, the protocol and the training together. What the device remembers
// is stored before an answer leaves, so that a tab that is closed, or a full disk, costs a round and nothing else.

import { Root, readRevocations } from "./aggregation/certificates.js";
import { Device } from "./aggregation/device.js";
import { LogState } from "./aggregation/logstate.js";
import { Participant } from "./aggregation/participant.js";
import { Policy } from "./aggregation/policy.js";
import { attend, nodeOf } from "./aggregation/websocket.js";
import { sha256 } from "./bytes.js";
import { ConfigError, DataError } from "./errors.js";
import { readInvitation } from "./invitation.js";
import { publicKeyOf } from "./keys.js";
import { trainerOf } from "./learning/round.js";
import { LIMITS } from "./learning/task.js";

export { Identity } from "./identity.js";

const LOCK = "edgeadapt/participation"; // one for all bases, as the account is
const ANOTHER = "another tab takes part: close it first";
const PATIENCE = 10_000; // milliseconds until another tab has left
const OPEN_ENDED = ["training", "sent"]; // outcomes of a round that has not ended

/** Take part until `signal` aborts; with `once`, until the gateway ends the run.
 *
 * `examples` as for `trainerOf`, and `minimum` their least number; `moments` says whether to contribute to an analytic head; `policy`
 * changes limits of policy.js; `quantum` as of a Participant. `alone` runs work while nothing else uses the engine. `shown` is called with
 * { state, round, step, steps, seconds, error, rounds }.
 *
 * Throws ConfigError: not enrolled, or another tab takes part. DataError: too few examples. ProtocolError: the gateway refuses this device.
 * */
export async function takePart({ engine, identity, url, examples, minimum, moments, policy, quantum, once, alone, signal, shown, pause }) {
  const own = examples.filter(({ split }) => split === "train").length;
  if (own < Math.max(1, minimum)) {
    throw new DataError(`there are ${own} examples to train on, and your minimum is ${minimum}: add some, or lower it`, "examples");
  }
  return identity.store.lock(LOCK, { ifAvailable: true }, async (lock) => {
    if (!lock) throw new ConfigError(ANOTHER, "participation");
    const known = await identity.load();
    if (!known?.certificate) throw new ConfigError("this browser is not enrolled: install its certificate first", "identity");
    const device = await deviceOf(known, engine, policy);
    const record = { ...known, maximum_epsilon: device.policy.maximum_epsilon };
    await identity.save(record); // the limit holds from now on, also at the next visit
    const rounds = new Rounds(identity, record, shown);
    const work = trainerOf(engine, examples, async (progress) => {
      shown({ state: "training", ...progress });
      await pause();
      signal.throwIfAborted();
    }, { ...LIMITS, moments });
    const train = async (plan, ...given) => {
      rounds.begin(plan);
      const made = await alone(() => work(plan, ...given));
      shown({ state: "masking", round: plan.round });
      return made;
    };
    const { adapter, sums, log, privacy, parts } = record;
    const states = { adapter, sums: sums ?? null, log: log && new LogState(log), privacy, parts, quantum, consents: moments ? ["moments"] : [], keep: (step, changed) => rounds.keep(step, changed) };
    const participant = new Participant(device, train, await nodeOf(record.device), states);
    const leaving = new AbortController();
    signal.addEventListener("abort", () => leaving.abort());
    const watch = (event) => {
      if (signal.aborted) return; // what it breaks off is no error
      shown(event);
      if (once && event.released && rounds.any) leaving.abort();
    };
    try {
      if (!signal.aborted) await attend({ device, participant, url, signal: leaving.signal, shown: watch });
    } finally {
      await rounds.end();
    }
  });
}

async function deviceOf({ pair, authority, coordinator, certificate, revocations }, { base }, policy) {
  const limits = new Policy({ ...policy, known_bases: [base.base_digest] });
  const { raw } = await publicKeyOf(pair);
  const pinned = await Root.open(authority);
  const root = revocations ? pinned.withRevocations(await readRevocations(pinned, revocations)) : pinned;
  return new Device({ key: pair.privateKey, publicKey: raw, certificate, root, coordinator, policy: limits });
}

/** What a person compares before this device enrols with a token: its device, authority and coordinator. */
export async function invited(token) {
  const { device, authority, coordinator } = await readInvitation(token);
  return { device, authority: await sha256(authority), coordinator: (await sha256(coordinator)).slice(0, 16) };
}

/** Delete an identity, when no tab takes part with it any more. Throws ConfigError: another tab does. */
export async function forget(identity) {
  try {
    await identity.store.lock(LOCK, { signal: AbortSignal.timeout(PATIENCE) }, () => identity.forget());
  } catch (error) {
    if (error.name !== "TimeoutError") throw error;
    throw new ConfigError(ANOTHER, "participation");
  }
}

/** Whether the certificate of an identity was renewed at `url`: it is asked for if it ends soon and no tab takes part. Taking part can
 * begin meanwhile, because the authority may be slow; the newer certificate is then left. Throws as `Identity.renewal`. */
export async function renew(identity, url) {
  const isFree = await identity.store.lock(LOCK, { ifAvailable: true }, (lock) => lock !== null);
  const found = isFree ? await identity.renewal(url) : null;
  return Boolean(found) && identity.store.lock(LOCK, { ifAvailable: true }, (lock) => lock !== null && identity.renew(found));
}

/** The rounds of a record, and the states in it. */
class Rounds {
  #record;
  #ended = false;
  #last = Promise.resolve(); // saving is one after the other: what comes after the end is dropped
  any = false; // whether a round began

  constructor(identity, record, shown) {
    Object.assign(this, { identity, shown });
    this.#record = { ...record, rounds: record.rounds.map(closed) };
  }

  begin({ round, adapter_version: version }) {
    this.any = true;
    const fresh = { at: Date.now(), round, version: Number(version), outcome: "training" };
    this.#record.rounds = [fresh, ...this.#record.rounds.map(closed)];
    this.shown({ rounds: this.#record.rounds });
  }

  /** Store the states after a step, and what became of the round. Throws ConfigError: there is no room for it. */
  keep(step, { log, ...states }) {
    const outcome = { plan: "sent", unmask: "counted" }[step];
    return this.#save(() => {
      const [current, ...others] = this.#record.rounds;
      const rounds = outcome && current ? [{ ...current, outcome }, ...others] : this.#record.rounds;
      return { ...this.#record, ...states, log: log && { ...log }, rounds };
    });
  }

  end() {
    const saved = this.#save(() => ({ ...this.#record, rounds: this.#record.rounds.map(closed) }));
    this.#ended = true;
    return saved;
  }

  #save(change) {
    if (this.#ended) throw new ConfigError("this device has left", "left");
    const saved = this.#last.then(async () => {
      const record = change();
      await this.identity.save(record);
      this.#record = record;
      this.shown({ state: "kept", rounds: record.rounds });
    });
    this.#last = saved.catch(() => {});
    return saved;
  }
}

/** A round that did not end for this device was not counted, as far as it knows. */
const closed = (one) => (OPEN_ENDED.includes(one.outcome) ? { ...one, outcome: "not counted" } : one);
