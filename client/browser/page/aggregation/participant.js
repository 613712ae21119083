// A device in a session: one message in, one step of the protocol, one message out, as client/node/app.py.

import { ProtocolError } from "../errors.js";
import { checkIn, join } from "./device.js";
import { COORDINATOR } from "./messages.js";

const METHODS = { roster: "onRoster", survivors: "onSurvivors", unmask: "onUnmask" };

/** `train` makes a device's contribution: (plan, spec) → a ring vector (contribution.js). `node`: Flower's id of this node. */
export class Participant {
  #device;
  #train;
  #node;
  #state = null;
  #last = Promise.resolve();

  constructor(device, train, node = 0n) {
    [this.#device, this.#train, this.#node] = [device, train, node];
  }

  /**
   * The answer to the request `step` (aggregation/steps.py) with this body. `at`: now in milliseconds, or null.
   *
   * Requests are answered one after the other. Throws ProtocolError: refused; the state is that of before.
   */
  answer(step, body, at = Date.now()) {
    const found = this.#last.then(() => this.#step(step, body, at));
    this.#last = found.catch(() => {});
    return found;
  }

  async #step(step, body, at) {
    const [device, state] = [this.#device, this.#state];
    if (step === "checkin") return checkIn(device, body, this.#node);
    let after;
    if (step === "offer") {
      after = await join(device, body, undefined, at);
    } else if (step === "plan" && state?.onPlan) {
      const planned = await state.onPlan(device, body, at);
      after = await planned.contribute(device, await this.#train(planned.plan, planned.spec));
    } else if (state?.[METHODS[step]]) {
      after = await state[METHODS[step]](device, body);
    } else {
      const held = state ? `is in the state ${state.constructor.name}` : "has joined no session";
      throw new ProtocolError(`unexpected ${step}: this device ${held}`, "step", COORDINATOR);
    }
    const [next, answer] = after;
    this.#state = next;
    return answer;
  }
}
