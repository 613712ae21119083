// The part of the page in which this browser enrols as a device, takes part in rounds, and says what became of them.

import { attempt, complain, create, element, readExamples, save, settle, showFacts } from "./dom.js";

const LIMITS = ["minimum_cohort", "minimum_survivors", "minimum_noise_multiplier", "maximum_epsilon"];
const STATES = {
  connecting: () => "Connecting to the gateway …",
  connected: () => "Connected. Waiting for the coordinator …",
  answering: ({ step }) => STEPS[step],
  training: ({ round, step, steps }) => `Round ${round}: training${steps ? `, step ${step} of ${steps}` : ""} …`,
  masking: ({ round }) => `Round ${round}: masking the update …`,
  away: ({ seconds, released, reason }) => `${sentAway(released, reason)}; connecting again in ${Math.ceil(seconds)} s.`,
};
const sentAway = (released, reason) => (released ? "The run is over" : reason ? `No connection: ${reason}` : "The connection broke");
const STEPS = {
  checkin: "The coordinator asks who this device is …",
  offer: "Checking the session that is on offer …",
  roster: "Sharing the secrets of this session's masks …",
  plan: "Checking the plan of a round …",
  survivors: "Checking whose updates are in the sum …",
  unmask: "Helping to take the masks off the sum …",
};

export class ParticipationView {
  #busy = false;
  #bundles = 0; // that were shown
  #known = null; // the identity

  constructor(client) {
    Object.assign(this, { client, ...addressesOf(document) });
    element("token").addEventListener("input", () => this.#invited());
    this.#on("token-form", "submit", () => this.#redeem());
    this.#on("enrol-form", "submit", () => this.#enrol());
    this.#on("certificate-form", "submit", () => this.#install());
    this.#on("request-file", "click", () => this.#saveRequest());
    this.#on("join-form", "submit", () => this.#takePart());
    this.#on("identity-forget", "click", () => this.#forget());
    element("join-leave").addEventListener("click", () => client.leave());
  }

  /** Begin with another bundle: the part is there where the page may connect to a gateway, and the bundle can be trained. */
  async show({ task, trainable }) {
    this.#bundles += 1;
    this.writes = task === "text-generation";
    element("participation").hidden = !this.gateway || !trainable;
    if (element("participation").hidden) return;
    settle("join-error");
    try {
      this.#identity(await this.client.identity());
      if (this.enrolment) this.#renew(); // the page does not wait for the authority
    } catch (error) {
      complain("join-error", error);
    }
  }

  /** Renew a certificate that ends soon. What comes of it is shown, unless the person did something else meanwhile. */
  async #renew() {
    const [bundle, known] = [this.#bundles, this.#known];
    const isLate = () => this.#busy || bundle !== this.#bundles || known !== this.#known;
    try {
      if (!(await this.client.renew(this.enrolment)) || isLate()) return;
      const found = await this.client.identity();
      if (!isLate()) this.#identity(found);
    } catch (error) {
      if (!isLate()) complain("join-error", error);
    }
  }

  #on(id, event, work) {
    const busy = (now) => {
      this.#busy = now;
      this.#buttons();
    };
    element(id).addEventListener(event, (given) => {
      given.preventDefault();
      if (!this.#busy) attempt("join-error", work, busy);
    });
  }

  #buttons(joined = false) {
    for (const id of ["redeem", "enrol", "certificate-install", "join", "identity-forget"]) element(id).disabled = this.#busy;
    element("join-leave").disabled = !joined;
  }

  #identity(found) {
    if (found && !this.#known) element("maximum_epsilon").value = found.privacy.limit; // set at an earlier visit
    this.#known = found;
    const { device, key, coordinator, authority, until, privacy, rounds = [] } = found ?? {};
    const day = until && new Date(until).toISOString().slice(0, 10);
    const certificate = day ? `until ${day}` : "not installed yet";
    const facts = found && {
      ...{ Device: device, Key: key, Coordinator: coordinator, Authority: authority, Gateway: this.gateway, Certificate: certificate },
      "Privacy spent": spentOf(privacy),
    };
    showFacts("identity", facts ?? {});
    element("token-form").hidden = !this.enrolment || Boolean(until);
    element("enrol-form").hidden = Boolean(found);
    element("certificate-form").hidden = !found || Boolean(until);
    element("join-form").hidden = !until;
    element("identity-end").hidden = !found;
    this.#rounds(rounds);
  }

  #rounds(rounds) {
    element("rounds").replaceChildren(...rounds.map(row));
    element("rounds-caption").textContent = rounds.length ? "Rounds that this browser took part in" : "";
  }

  async #invited() {
    const token = element("token").value;
    const found = await this.client.invited(token).catch(() => null);
    if (token !== element("token").value) return; // another one since
    const { device, authority, coordinator } = found ?? {};
    showFacts("invited", found ? { Device: device, Authority: authority, Coordinator: coordinator } : {});
  }

  async #redeem() {
    try {
      this.#identity(await this.client.redeem(element("token").value, this.enrolment));
    } catch (error) {
      this.#identity(await this.client.identity()); // the key is there, for another attempt
      throw error;
    }
    element("token").value = "";
    element("invited").replaceChildren();
  }

  async #enrol() {
    const device = element("device-name").value.trim();
    const [authority, coordinator] = [await text("authority-file"), await text("coordinator-file")];
    if (!authority || !coordinator) throw new Error("pick the authority's certificate and the coordinator's key");
    this.#identity(await this.client.enrol({ device, authority, coordinator }));
    this.#saveRequest();
  }

  async #install() {
    const certificate = await text("certificate-file");
    if (!certificate) throw new Error("pick the certificate that the authority issued");
    this.#identity(await this.client.install(certificate));
  }

  #saveRequest() {
    save(`${this.#known.device}.csr`, this.#known.request);
  }

  async #forget() {
    element("identity-end").open = false;
    this.#identity(await this.client.forget());
  }

  async #takePart() {
    const examples = await readExamples(element("examples-file").files[0], this.writes);
    const policy = Object.fromEntries(LIMITS.map((name) => [name, element(name).valueAsNumber]));
    const moments = element("moments").checked;
    const options = { policy, moments, minimum: element("minimum-examples").valueAsNumber, once: element("join-when").value === "once" };
    const quantum = 1000 * element("answer-quantum").valueAsNumber;
    this.#buttons(true);
    try {
      this.#identity(await this.client.takePart({ examples, url: this.gateway, quantum, ...options }, (event) => this.#progress(event)));
    } finally {
      element("join-state").textContent = "This browser does not take part now.";
      element("join-progress").hidden = true;
    }
  }

  #progress(event) {
    const { state, step, steps, rounds, error } = event;
    if (rounds) this.#rounds(rounds);
    if (error) complain("join-error", { message: error });
    if (STATES[state]) element("join-state").textContent = STATES[state](event);
    const bar = element("join-progress");
    bar.hidden = state !== "training" || !steps;
    if (!bar.hidden) bar.value = step / steps;
  }
}

/** Where the page's security policy lets it connect besides its own server: { gateway, enrolment }, each a URL or "". */
function addressesOf({ head }) {
  const policy = head.querySelector("meta[http-equiv=Content-Security-Policy]").content;
  const [gateway, enrolment] = /connect-src 'self' ([^;]+)/.exec(policy)?.[1].trim().split(" ") ?? [];
  const url = (address, call) => (address ? `${address}/edgeadapt.gateway.v1/${call}` : "");
  return { gateway: url(gateway, "attend"), enrolment: url(enrolment, "enrol") };
}

const text = async (id) => element(id).files[0]?.text();

function spentOf({ epsilon, delta, noisy, bare }) {
  const hidden = `epsilon ${epsilon.toFixed(2)} for delta ${delta} by ${noisy} contributions with noise`;
  return bare ? `${hidden}; ${bare} without noise, which nothing bounds` : hidden;
}

function row({ at, round, version, outcome }) {
  const cells = [new Date(at).toLocaleString(), `round ${round}, adapter ${version}`, outcome];
  return create("tr", { "data-outcome": outcome }, ...cells.map((each) => create("td", {}, each)));
}
