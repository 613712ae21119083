// The part of the page that classifies a phrase and shows the most likely intents.

import { breakable, complain, create, element, leftOut, onSubmit, said, settle, words } from "./dom.js";

const TOP = 5;

export class PhraseView {
  #asked = 0; // questions so far: an answer is shown only if no later question was asked
  #pending = 0; // switches to another adapter that have not ended
  #changed = false; // whether one of them has put another adapter in use

  constructor(client) {
    this.client = client;
    onSubmit("classify-form", () => this.#ask());
  }

  show() {
    this.#answer("", []);
    settle("phrase-error", element("phrase"));
  }

  /** Hide the answer of the adapter that is in use, while another one is put in use. */
  switching() {
    this.#pending += 1;
    this.#asked += 1;
    element("answer").dataset.stale = "yes";
  }

  /** After the last switch, ask for the same phrase again; if no adapter took another's place, show the old answer. */
  async switched(done) {
    this.#pending -= 1;
    this.#changed ||= done;
    if (this.#pending) return;
    if (this.#changed && element("phrase").value.trim()) await this.#ask();
    else if (this.#changed) this.#answer("", []);
    if (this.#pending) return;
    this.#changed = false;
    delete element("answer").dataset.stale;
  }

  async #ask() {
    const field = element("phrase");
    const [text, number] = [field.value, ++this.#asked];
    settle("phrase-error", field);
    try {
      const found = await this.client.classify(text, TOP);
      if (number === this.#asked) this.#answer(caption(text, found), found.labels, `${found.milliseconds.toFixed(1)} ms`);
    } catch (error) {
      if (number !== this.#asked) return;
      this.#answer("", []);
      complain("phrase-error", error, field);
    }
  }

  #answer(text, labels, title = "") {
    Object.assign(element("answer-caption"), { textContent: text, title });
    element("answers").replaceChildren(...labels.map(row));
  }
}

function caption(text, { adapter, unknown, unread, outcome, says }) {
  const share = unknown ? `, ${(100 * unknown).toFixed(0)} % of its tokens unknown to the base` : "";
  const rule = says ? ` ${says}` : outcome === "confirm" ? " To be confirmed." : "";
  return `${said(text)} with ${adapter}${share}.${leftOut(unread)}${rule}`;
}

function row({ label, probability }) {
  const shown = words(label);
  const meter = create("meter", "", { min: 0, max: 1, value: probability });
  meter.setAttribute("aria-label", shown);
  const percent = `${(100 * probability).toFixed(1)} %`;
  const cells = [create("th", "", { scope: "row" }), create("td", ""), create("td", percent)];
  cells[0].append(...breakable(shown));
  cells[1].append(meter);
  const row = create("tr", "");
  row.dataset.probability = probability;
  row.append(...cells);
  return row;
}
