// The part of the page in which a person teaches the right answer to a phrase or a message, takes a lesson back, and saves
// the private adapter to files.

import { attempt, create, element, leftOut, onSubmit, readExamples, said, save, settle, words } from "./dom.js";

const MAX_SHOWN = 60; // characters of a text, as `edgeadapt device learn` prints

export class LearnView {
  #known; // { adapters, learned, lessons }: of all adapters, of those that were learned in this browser, and how many can be undone
  #inUse; // { name, parts }
  #busy = false;
  #writes = false; // whether the bundle's model writes answers
  #asked = null; // { message }, that the answer to teach is for, of a model that writes

  /** `taught` is called with the adapters after a lesson, and the name of the one to use. */
  constructor(client, taught) {
    Object.assign(this, { client, taught });
    onSubmit("teach-form", () => this.#work(() => this.#teach()));
    element("teach-cancel").addEventListener("click", () => client.stop());
    element("teach-undo").addEventListener("click", () => this.#work(() => this.#undo()));
    element("teach-files").addEventListener("click", () => this.#work(() => this.#save()));
  }

  show(bundle) {
    this.#known = bundle;
    this.#writes = bundle.task === "text-generation";
    element("learn").hidden = !bundle.trainable;
    element("teach-label-field").hidden = element("teach-label").disabled = this.#writes;
    element("teach-compare-field").hidden = !this.#writes;
    element("teach-compare").value = "";
    this.#ask(null, "");
    this.#result("", []);
    settle("teach-error");
  }

  /** Ask for the right answer to a message, in place of the one that was given. */
  correct(message, given) {
    this.#ask(message, given);
    element("teach-answer").select();
    element("teach-answer").focus();
  }

  #ask(message, given) {
    const asks = message !== null;
    this.#asked = asks ? { message } : null;
    element("teach-how").hidden = !this.#writes || asks;
    element("teach-answer-field").hidden = element("teach-answer").disabled = !asks;
    element("teach-message").textContent = message ?? "";
    element("teach-answer").value = given;
    this.#buttons();
  }

  /** Offer the labels of what is in use now: { name, parts }. */
  switched(inUse) {
    this.#inUse = inUse;
    const first = this.#known.adapters.find(({ name }) => name === inUse?.parts[0]?.name);
    const labels = first?.manifest?.labels ?? [];
    const shown = [...element("teach-label").options].map(({ value }) => value);
    if (String(shown) !== String(["", ...labels])) {
      const options = labels.map((label) => create("option", { value: label }, words(label)));
      element("teach-label").replaceChildren(create("option", { value: "" }, "Choose …"), ...options);
    }
    element("teach-save").hidden = !this.#known.learned.includes(inUse?.name);
  }

  #buttons() {
    element("teach").disabled = this.#busy || (this.#writes && !this.#asked);
    element("teach-cancel").disabled = !this.#busy;
    element("teach-undo").disabled = this.#busy || !this.#known.lessons;
  }

  #work(work) {
    if (this.#busy) return;
    this.#result("", []);
    attempt("teach-error", work, (busy) => {
      this.#busy = busy;
      element("teach-progress").hidden = true;
      this.#buttons();
    });
  }

  async #teach() {
    if (this.#inUse?.parts.length !== 1 || this.#inUse.parts[0].weight !== 1) {
      throw new Error("one adapter learns at a time: use one alone");
    }
    const [{ name }, asked, correction] = [this.#inUse, this.#asked, this.#correction()]; // a person may go on during the lesson
    const [file] = this.#writes ? element("teach-compare").files : [];
    const done = await this.client.teach(name, [correction], await readExamples(file, true), progress).catch((error) => {
      throw error.about === "compared" ? new Error(`${file.name}: ${error.message}`) : error;
    });
    await this.#use(done, done.adapter);
    const learned = `${done.adapter} version ${done.version}: ${done.known} of ${done.taught.length} learned`;
    const [others, rows] = this.#writes ? forgotten(done) : otherwise(done);
    if (asked === this.#asked) this.#ask(null, ""); // else a person writes the next one already
    this.#result(`${learned}, ${done.steps} steps.${others}`, rows, `${done.seconds.toFixed(1)} s`);
  }

  #correction() {
    if (!this.#writes) return { text: element("phrase").value, label: element("teach-label").value };
    return { text: this.#asked.message, label: element("teach-answer").value.trim() };
  }

  async #undo() {
    const done = await this.client.undo();
    await this.#use(done, done.adapter ?? undefined);
    this.#result(`Undone: ${done.corrections.map(({ text, label }) => `${said(text)} as ${this.#writes ? label : words(label)}`).join(", ")}`, []);
  }

  async #save() {
    const { name } = this.#inUse;
    const { manifest, blob, pem } = await this.client.exported(name);
    save(`${name}.json`, manifest);
    save(`${name}.onnx_adapter`, blob);
    save(`${name}.pem`, pem);
    this.#result(`Saved: ${name}.json, ${name}.onnx_adapter and ${name}.pem, the key that signed them.`, []);
  }

  async #use(done, name) {
    this.#known = done;
    this.#buttons();
    await this.taught(done.adapters, name);
  }

  #result(text, rows, title = "") {
    Object.assign(element("teach-result"), { textContent: text, title });
    element("teach-changed").replaceChildren(...rows.map((row) => create("li", {}, row)));
  }
}

function progress({ steps, most, comparing }) {
  const bar = element("teach-progress");
  bar.hidden = false;
  bar.value = comparing ? comparing.part / comparing.of : steps / most;
  const learning = `Learning: step ${steps + 1} of at most ${most} …`;
  element("teach-result").textContent = comparing ? `Comparing: part ${comparing.part} of ${comparing.of} …` : learning;
}

/** What a classifier answers otherwise after a lesson: a sentence, and a row for each phrase. */
function otherwise({ changed, tested, taught: [{ unread }] }) {
  const answer = ({ label, probability }) => `${words(label)} ${(100 * probability).toFixed(1)} %`;
  const row = ({ text, label, before, after }) => {
    const wrong = after.label === label ? "" : `; forgotten: ${words(label)}`;
    return `${said(text)}: ${answer(before)} → ${answer(after)}${wrong}`;
  };
  const others = tested ? ` ${changed.length} of ${tested} other known phrases are answered otherwise.` : "";
  return [others + leftOut(unread), changed.map(row)];
}

const short = (text) => [...text.trim().replace(/\s+/g, " ")].slice(0, MAX_SHOWN).join("");

/** What texts cost a language model before and after a lesson: answers that were taught, now and earlier, and those to compare. */
function forgotten({ taught, others, compared }) {
  const row = ({ label, text, before, after }) => `${before.toFixed(3)} → ${after.toFixed(3)} “${short(label ?? text)}”`;
  const mean = (when) => (compared.reduce((sum, one) => sum + one[when], 0) / compared.length).toFixed(3);
  const some = compared?.length ? ` ${compared.length} texts to compare: ${mean("before")} → ${mean("after")} on average.` : "";
  const ended = compared ? "" : " The comparison was canceled.";
  const rows = [...taught.map(row), ...others.map((one) => `${row(one)}, taught earlier`)];
  return [`${some}${ended} Bits per byte before → after:`, [...rows, ...(compared ?? []).map((one) => `${row(one)}, compared`)]];
}
