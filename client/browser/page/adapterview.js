// The part of the page that shows the adapters of the bundle, and puts one, or several as one, in use.

import { complain, create, element, onSubmit, settle } from "./dom.js";
import { Picker } from "./picker.js";

const BARE = ""; // engine.js: the base without an adapter

export class AdapterView {
  #weights = new Map(); // of a composition: name → what its field says
  inUse; // { name, rank, parts }, undefined before the first; it is kept when something else is refused

  /** `switching` is called when another adapter is going to answer, and `switched` with whether it does. */
  constructor(client, { switching, switched }) {
    Object.assign(this, { client, switching, switched });
    const elements = { search: element("adapter-search"), list: element("adapters"), count: element("adapter-count") };
    this.picker = new Picker(elements, (name) => this.#pick(name));
    element("composing").addEventListener("change", () => this.#startOrEnd());
    element("parts").addEventListener("change", ({ target }) => {
      this.#weights.set(target.dataset.name, target.value);
      this.#compose();
    });
    onSubmit("parts", () => {});
    element("parts").addEventListener("click", ({ target }) => target.type === "button" && this.#remove(target.value));
  }

  /** Show adapters, and use the one of this name; by default, the bundle's default one. */
  async show(adapters, generates, name = defaultAdapter(adapters, generates)) {
    const items = adapters.map(({ name, manifest, refused }) => {
      return { name, title: name, note: refused ?? described(manifest), refused: Boolean(refused) };
    });
    if (generates) items.push({ name: BARE, title: "no adapter", note: "the base alone" });
    this.inUse = undefined;
    element("in-use").textContent = "";
    element("composing").checked = false;
    element("composing").disabled = adapters.filter(({ manifest }) => manifest).length < 2;
    this.#weights.clear();
    this.picker.show(items);
    this.#mark();
    settle("adapter-error");
    if (name !== undefined) await this.#use(name);
    else complain("adapter-error", { message: "the bundle has no adapter that can be used; export one to it" });
  }

  #pick(name) {
    if (!element("composing").checked) return this.#use(name);
    if (name === BARE) return complain("adapter-error", { message: "the base alone is no part of a composition" });
    if (!this.#weights.delete(name)) this.#weights.set(name, "1");
    return this.#compose();
  }

  /** What is in use stays in use: it is the beginning of a composition, or its end. */
  #startOrEnd() {
    this.#weights.clear();
    if (element("composing").checked) {
      for (const { name, weight } of this.inUse?.parts ?? []) this.#weights.set(name, String(weight));
    }
    settle("adapter-error");
    this.#mark();
  }

  #remove(name) {
    element("adapters").focus(); // the button that has it goes
    return this.#pick(name);
  }

  async #compose() {
    this.#mark();
    if (!this.#weights.size) return settle("adapter-error");
    return this.#use([...this.#weights].map(([name, weight]) => `${name}:${weight}`).join("+"));
  }

  async #use(text) {
    settle("adapter-error");
    this.switching();
    let done;
    try {
      done = await this.client.use(text);
      this.inUse = done;
      settle("adapter-error"); // of a choice before this one
      const title = `switched in ${done.milliseconds.toFixed(2)} ms`;
      Object.assign(element("in-use"), { textContent: inWords(done), title });
    } catch (error) {
      complain("adapter-error", { message: this.inUse ? `${error.message}. ${inWords(this.inUse)}.` : error.message });
    }
    this.#mark();
    await this.switched(Boolean(done));
  }

  /** Show what is selected: what is in use, or the parts of the composition, each with its weight. */
  #mark() {
    const composing = element("composing").checked;
    const names = composing ? [...this.#weights.keys()] : [this.inUse?.name];
    this.picker.select(names, composing);
    element("parts").hidden = !composing;
    element("parts-hint").hidden = this.#weights.size > 0;
    const shown = [...element("weights").querySelectorAll("input")].map((input) => input.dataset.name);
    if (String(shown) === String([...this.#weights.keys()])) return; // so that the field in use keeps the focus
    element("weights").replaceChildren(...[...this.#weights].map(part));
  }
}

function part([name, weight]) {
  const input = create("input", { type: "number", step: "any", value: weight, "data-name": name });
  const remove = create("button", { type: "button", value: name, "aria-label": `Remove ${name}` }, "Remove");
  return create("li", {}, create("label", {}, create("span", {}, name), input), remove);
}

const inWords = ({ name, rank }) => (name === BARE ? "In use: the base alone" : `In use: ${name}, rank ${rank}`);

/** As Library.default in client/inference/library.py: the personal adapter, else the global one, else the first. */
function defaultAdapter(adapters, generates) {
  const usable = adapters.filter(({ manifest }) => manifest);
  const personal = usable.filter(({ manifest }) => manifest.parent !== null);
  const candidates = [personal, usable.filter(({ name }) => name === "global"), usable];
  return candidates.find((found) => found.length)?.[0].name ?? (generates ? BARE : undefined);
}

function described({ parent, version, format, rank, size, privacy }) {
  const bound = privacy && `epsilon ${privacy.epsilon.toFixed(2)} for delta ${privacy.delta}`;
  const kind = parent === null ? `global, ${bound ?? "without differential privacy"}` : "personal";
  return `${kind}, version ${version}, rank ${rank}, ${format}, ${(size / 1000).toFixed(0)} kB`;
}
