// A listbox with a search field, for mouse, touch and keyboard: the WAI-ARIA pattern "combobox", with a list that is
// always shown. The field filters as one types; the arrow keys move in the list; Enter picks; Escape clears the field.

import { create } from "./dom.js";

const LONG = 6; // items; a longer list has the search field, and scrolls in a constant height
const PAGE = 8; // items that PageUp and PageDown move

export class Picker {
  #items = []; // { name, title, note, refused, option, text }
  #active = -1; // its place among the shown ones

  /** `pick` is called with the name of an item. The elements: an input, a list, and a line for the number of items. */
  constructor({ search, list, count }, pick) {
    Object.assign(this, { search, list, count, pick });
    search.addEventListener("input", () => this.#filter());
    for (const target of [search, list]) target.addEventListener("keydown", (event) => this.#key(event));
    list.addEventListener("click", ({ target }) => this.#choose(target.closest("[role=option]")));
  }

  /** Show items, [{ name, title, note, refused }]: `refused` ones cannot be picked, and their note says why. */
  show(items) {
    this.#items = items.map((item, i) => ({ ...item, option: option(item, i), text: searched(item) }));
    this.list.replaceChildren(...this.#items.map((item) => item.option));
    this.list.dataset.long = this.search.parentElement.dataset.long = items.length > LONG;
    this.search.value = "";
    this.#filter();
  }

  select(names, several = false) {
    this.list.setAttribute("aria-multiselectable", String(several));
    for (const { name, option } of this.#items) option.setAttribute("aria-selected", String(names.includes(name)));
  }

  #shown() {
    return this.#items.filter(({ option }) => !option.hidden);
  }

  #filter() {
    const words = this.search.value.toLowerCase().split(/\s+/);
    for (const { option, text } of this.#items) option.hidden = !words.every((word) => text.includes(word));
    const [shown, all] = [this.#shown().length, this.#items.length];
    this.count.textContent = shown === all ? `${all} adapters` : `${shown} of ${all} adapters`;
    this.#activate(this.search.value.trim() && shown ? 0 : -1);
    this.list.scrollTop = 0;
  }

  #activeOption() {
    return this.#shown()[this.#active]?.option;
  }

  #activate(at) {
    this.#active = Math.min(at, this.#shown().length - 1);
    for (const { option } of this.#items) option.classList.remove("active");
    const active = this.#activeOption();
    for (const target of [this.search, this.list]) target.setAttribute("aria-activedescendant", active?.id ?? "");
    if (!active) return;
    active.classList.add("active");
    // Not scrollIntoView, which would scroll the page too.
    const { offsetTop: top, offsetHeight: height } = active;
    this.list.scrollTop = Math.min(top, Math.max(this.list.scrollTop, top + height - this.list.clientHeight));
  }

  #key(event) {
    const inField = event.target === this.search;
    const last = this.#shown().length - 1;
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: PAGE, PageUp: -PAGE };
    if (event.key in moves) this.#activate(Math.max(0, Math.min(last, this.#active + moves[event.key])));
    else if (event.key === "Home" && !inField) this.#activate(0);
    else if (event.key === "End" && !inField) this.#activate(last);
    else if (event.key === "Enter" || (event.key === " " && !inField)) this.#choose(this.#activeOption());
    else if (event.key === "Escape" && this.search.value) this.#clear();
    else return;
    event.preventDefault();
  }

  #clear() {
    this.search.value = "";
    this.#filter();
  }

  #choose(option) {
    const item = this.#items.find((each) => each.option === option);
    if (!item || item.refused) return;
    this.#activate(this.#shown().indexOf(item));
    this.pick(item.name);
  }
}

function option({ name, title, note, refused }, i) {
  const state = refused ? { "aria-disabled": "true" } : {};
  const shown = [create("strong", {}, title), create("small", {}, note)];
  return create("li", { id: `adapter-${i}`, role: "option", "data-name": name, ...state }, ...shown);
}

const searched = ({ title, note }) => `${title} ${note}`.toLowerCase();
