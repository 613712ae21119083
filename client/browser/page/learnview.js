// The part of the page in which a person teaches the right answer to a phrase, takes a lesson back, and saves the private
// adapter to files.

import { complain, create, element, settle } from "./dom.js";

export class LearnView {
  #labels = new Map(); // name of an adapter → its labels
  #learned = new Set(); // the names of adapters that were learned in this browser
  #inUse; // { name, parts }
  #busy = false;
  #lessons = 0; // that can be undone

  /** `taught` is called with the adapters after a lesson, and the name of the one to use. */
  constructor(client, taught) {
    Object.assign(this, { client, taught });
    element("teach-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#work(() => this.#teach());
    });
    element("teach-cancel").addEventListener("click", () => client.stop());
    element("teach-undo").addEventListener("click", () => this.#work(() => this.#undo()));
    element("teach-files").addEventListener("click", () => this.#work(() => this.#save()));
  }

  /** Begin with another bundle. */
  show({ adapters, lessons, learned }) {
    this.#know(adapters, lessons, learned);
    this.#result("", []);
    settle("teach-error");
  }

  /** Offer the labels of what is in use now: { name, parts }. */
  switched(inUse) {
    this.#inUse = inUse;
    const labels = this.#labels.get(inUse?.parts[0]?.name) ?? [];
    const shown = [...element("teach-label").options].map(({ value }) => value);
    if (String(shown) !== String(["", ...labels])) {
      const options = labels.map((label) => create("option", label, { value: label }));
      element("teach-label").replaceChildren(create("option", "Choose …", { value: "" }), ...options);
    }
    element("teach-save").hidden = !this.#learned.has(inUse?.name);
  }

  #know(adapters, lessons, learned) {
    this.#labels = new Map(adapters.map(({ name, manifest }) => [name, manifest?.labels ?? []]));
    this.#learned = new Set(learned);
    this.#lessons = lessons;
    this.#buttons();
  }

  #buttons() {
    element("teach").disabled = this.#busy;
    element("teach-cancel").disabled = !this.#busy;
    element("teach-undo").disabled = this.#busy || !this.#lessons;
  }

  async #work(work) {
    if (this.#busy) return;
    this.#busy = true;
    this.#buttons();
    settle("teach-error");
    this.#result("", []);
    try {
      await work();
    } catch (error) {
      complain("teach-error", error);
    } finally {
      this.#busy = false;
      element("teach-progress").hidden = true;
      this.#buttons();
    }
  }

  async #teach() {
    if (this.#inUse?.parts.length !== 1 || this.#inUse.parts[0].weight !== 1) {
      throw new Error("one adapter learns at a time: use one alone");
    }
    const correction = { text: element("phrase").value, label: element("teach-label").value };
    const done = await this.client.teach(this.#inUse.name, [correction], progress);
    await this.#use(done, done.adapter);
    const learned = `${done.adapter} version ${done.version}: ${done.known} of ${done.taught.length} learned`;
    const others = done.tested ? ` ${done.changed.length} of ${done.tested} other known phrases are answered otherwise.` : "";
    this.#result(`${learned}, ${done.steps} steps, ${done.seconds.toFixed(1)} s.${others}`, done.changed);
  }

  async #undo() {
    const done = await this.client.undo();
    await this.#use(done, done.adapter ?? undefined);
    this.#result(`Undone: ${done.corrections.map(({ text, label }) => `“${text}” as ${label}`).join(", ")}`, []);
  }

  async #save() {
    const { name } = this.#inUse;
    const { manifest, blob, pem } = await this.client.exported(name);
    for (const [file, bytes] of [[`${name}.json`, manifest], [`${name}.onnx_adapter`, blob], [`${name}.pem`, pem]]) {
      const link = create("a", "", { href: URL.createObjectURL(new Blob([bytes])), download: file });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // when the browser has read it
    }
    this.#result(`Saved: ${name}.json, ${name}.onnx_adapter and ${name}.pem, the key that signed them.`, []);
  }

  async #use({ adapters, lessons, learned }, name) {
    this.#know(adapters, lessons, learned);
    await this.taught(adapters, name);
  }

  #result(text, changed) {
    element("teach-result").textContent = text;
    element("teach-changed").replaceChildren(...changed.map(row));
  }
}

function progress({ steps, most }) {
  const bar = element("teach-progress");
  bar.hidden = false;
  bar.value = steps / most;
  element("teach-result").textContent = `Learning: step ${steps + 1} of at most ${most} …`;
}

function row({ text, label, before, after }) {
  const answer = (found) => `${found.label} ${(100 * found.probability).toFixed(1)} %`;
  const forgotten = after.label === label ? "" : `; forgotten: ${label}`;
  return create("li", `“${text}”: ${answer(before)} → ${answer(after)}${forgotten}`);
}
