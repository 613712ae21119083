// A device in a session: one message in, one step of the protocol, one message out, as client/node/step.py.

import { ProtocolError, TrustError } from "../errors.js";
import * as adapterstate from "./adapterstate.js";
import { newerThan, readRevocations, requireFresh } from "./certificates.js";
import { checkIn, join } from "./device.js";
import { LogState } from "./logstate.js";
import { COORDINATOR, Plan, Unmask, refuse, signedHeader, unverifiedBody } from "./messages.js";
import * as privacyledger from "./privacyledger.js";
import * as sumhistory from "./sumhistory.js";

const QUANTUM = 60_000; // milliseconds
const READ_EXAMPLES = ["offer", "plan"]; // steps

/** A device that answers.
 *
 * `train` makes its contribution: (plan, spec, blob, parts) → { vector, parts } (learning/round.js), with the adapter's file and what the
 * device keeps to itself of an adapter, or null. `node`: Flower's id of this node. `adapter`, `sums` and `log` are what it remembers of
 * earlier sessions (adapterstate.js, sumhistory.js, logstate.js), or null; it joins sessions that need consent to `consents` only, and
 * `privacy` is its account (privacyledger.js); `keep` stores them after each step, (step, { adapter, sums, log, privacy, parts, revocations
 * }), before the answer leaves. Offers and plans are answered at a multiple of `quantum` milliseconds after they arrived, which hides how
 * long training took; 0: at once. */
export class Participant {
  #device;
  #train;
  #node;
  #keep;
  #quantum;
  #consents;
  #state = null;
  #known; // { adapter, sums, log, privacy, parts }
  #last = Promise.resolve();

  constructor(device, train, node = 0n, { keep = async () => {}, quantum = QUANTUM, consents = ["moments"], ...known } = {}) {
    [this.#device, this.#train, this.#node, this.#keep, this.#quantum] = [device, train, node, keep, quantum];
    this.#consents = consents;
    this.#known = { adapter: null, sums: null, log: null, privacy: privacyledger.EMPTY, parts: null, ...known };
  }

  /** The answer to the request `step` (aggregation/steps.py). `fields`: { body, adapter, proof, revocations }, as far as there are any.
   * `at`: now in milliseconds, or null. Requests are answered one after the other. Throws ProtocolError: refused. */
  answer(step, fields, at = Date.now()) {
    const found = this.#last.then(() => this.#kept(step, fields, at));
    this.#last = found.catch(() => {});
    return found;
  }

  async #kept(step, fields, at) {
    const begun = performance.now();
    const known = this.#known;
    try {
      const answer = await this.#step(step, fields, at);
      const revocations = this.#device.root.revoked?.der ?? null;
      await this.#keep(step, { ...this.#known, revocations });
      return answer;
    } catch (error) {
      this.#known = known; // nothing leaves that was not kept; the round is lost
      throw error;
    } finally {
      if (READ_EXAMPLES.includes(step)) await untilMultiple(begun, this.#quantum);
    }
  }

  async #step(step, { body, consent, adapter, proof, revocations }, at) {
    if (!body) refuse("the message has no body", "message.body");
    const state = this.#state;
    if (step === "checkin") return this.#checkIn(body, consent);
    if (step === "offer") return this.#offer(body, proof, revocations, at);
    if (step === "roster" && state?.onRoster) return this.#after(await state.onRoster(this.#device, body));
    if (step === "plan" && state?.onPlan) return this.#plan(body, adapter, proof, at);
    if (step === "survivors" && state?.onSurvivors) return this.#survivors(body);
    if (step === "unmask" && state?.onUnmask) return this.#unmask(body);
    const held = state ? "is in another step of its session" : "has joined no session";
    refuse(`unexpected ${step}: this device ${held}`, "step");
  }

  async #checkIn(challenge, consent) {
    const answer = await checkIn(this.#device, challenge, this.#node, this.#known.log?.offer ?? null);
    const agrees = !consent || this.#consents.includes(new TextDecoder().decode(consent));
    if (!agrees) refuse("this device does not contribute what the session sums", "consent");
    return answer;
  }

  #after([state, answer]) {
    this.#state = state;
    return answer;
  }

  #remember(changes) {
    this.#known = { ...this.#known, ...changes };
  }

  async #offer(body, proof, revocations, at) {
    if (revocations) await this.#install(revocations);
    const { root, policy } = this.#device;
    if (at !== null) requireFresh(root.revoked, policy.revocation_days, at);
    const joined = await join(this.#device, body, undefined, at);
    this.#remember({ log: await this.#afterOffer(joined[0], proof) });
    return this.#after(joined);
  }

  /** Verifies that the log of the offered session follows the log that this device knows. */
  async #afterOffer({ me, offer, spec }, proof) {
    const { policy, coordinator } = this.#device;
    if (!policy.demand_proofs) return null;
    if (!proof) refuse("the message has no proof about the log", "message.proof");
    const { log, sums } = this.#known;
    const other = (sums?.round?.point.base ?? spec.base_digest) !== spec.base_digest;
    return log ? log.onSessionChainProof(coordinator, proof, offer, other) : LogState.initial(coordinator, proof, offer, me);
  }

  /** Verifies the log: this device's messages of its last round are in it, and its newest adapter is the plan's. */
  async #afterReceipt(plan, proof) {
    const { policy, coordinator } = this.#device;
    if (!policy.demand_proofs) return null;
    if (!proof) refuse("the message has no proof about the log", "message.proof");
    const after = await this.#known.log.onReceipt(coordinator, proof);
    after.requireNewest(plan);
    return after;
  }

  /** Installs the list that the coordinator forwards. It can withhold a list, but not forge one. */
  async #install(raw) {
    const { root } = this.#device;
    const renewed = async () => root.withRevocations(newerThan(await readRevocations(root, raw), root.revoked));
    this.#device = this.#device.withRoot(await ProtocolError.blaming(COORDINATOR, TrustError, renewed));
  }

  async #plan(body, blob, proof, at) {
    const planned = await this.#state.onPlan(this.#device, body, at);
    this.#state = planned; // whatever fails from here on, the device can take part in a later round
    const { plan, spec, ready } = planned;
    const { policy } = this.#device;
    const log = await this.#afterReceipt(plan, proof);
    const adapter = adapterstate.onPlan(this.#known.adapter, plan, spec, policy.maximum_repeats);
    const sums = await sumhistory.onPlan(this.#known.sums, plan, spec, blob, policy.minimum_movement);
    const privacy = privacyledger.onPlan(this.#known.privacy, spec, ready.serials.size, policy);
    const { vector, parts } = await this.#train(plan, spec, blob, this.#known.parts);
    const answer = this.#after(await planned.contribute(this.#device, vector));
    if (parts) this.#remember({ parts });
    this.#remember({ adapter, sums, privacy, log: log && (await log.contributed(await Plan.digest(plan), signedHeader(answer))) });
    return answer;
  }

  async #survivors(body) {
    const state = this.#state;
    const [confirmed, answer] = await state.onSurvivors(this.#device, body);
    // It signs for no sum for which it would reveal no shares. With groups, others then count on its signature.
    const bound = this.#afterSum(state, confirmed.survivors);
    if (state.ready.session.spec.grouping) this.#remember(bound);
    const { log } = this.#known;
    this.#remember({ log: log && (await log.onSurvivors(confirmed.survivors.vectors.keys(), answer)) });
    return this.#after([confirmed, answer]);
  }

  async #unmask(body) {
    const state = this.#state;
    const after = await state.onUnmask(this.#device, body);
    const { survivors } = Unmask.decode(unverifiedBody(body));
    const { session: { spec }, serials } = state.ready;
    if (!spec.grouping) this.#remember(this.#afterSum(state, survivors));
    const { log, privacy } = this.#known;
    this.#remember({
      log: log && (await log.onSurvivors(survivors.vectors.keys())),
      privacy: privacyledger.onSurvivors(privacy, spec, serials.size, survivors.vectors.size, this.#device.policy),
    });
    return this.#after(after);
  }

  #afterSum({ ready, plan }, { vectors }) {
    const serials = new Map([...vectors.keys()].map((device) => [device, ready.serials.get(device)]));
    const given = [plan, ready.session.spec, serials, this.#device.root.revoked?.serials ?? new Set()];
    return { adapter: adapterstate.onSurvivors(this.#known.adapter, ...given), sums: sumhistory.onSurvivors(this.#known.sums, ...given) };
  }
}

/** Waits until a multiple of `quantum` milliseconds has passed since `begun`. */
async function untilMultiple(begun, quantum) {
  if (!quantum) return;
  const left = quantum - ((performance.now() - begun) % quantum);
  await new Promise((resolve) => setTimeout(resolve, left));
}
