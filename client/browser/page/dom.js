// What the parts of the page share: finding and making elements, errors next to what failed, and keys.

import { isWindow, longest } from "./media.js";

export const element = (id) => document.getElementById(id);

/** A new element with attributes and children, elements or texts. */
export function create(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function showFacts(id, facts) {
  const pairs = Object.entries(facts).map(([term, value]) => create("div", {}, create("dt", {}, term), create("dd", {}, value ?? "")));
  element(id).replaceChildren(...pairs);
}

export function save(name, content) {
  const link = create("a", { href: URL.createObjectURL(new Blob([content])), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // when the browser has read it
}

/** Show an error in the alert `id`. The field that it is about is marked and gets the focus. An alert is announced by a screen reader
 * when its text changes. */
export function complain(id, error, field) {
  element(id).textContent = error.message;
  field?.setAttribute("aria-invalid", "true");
  field?.focus();
}

/** Remove the error in the alert `id`, and the mark of its field. */
export function settle(id, field) {
  element(id).textContent = "";
  field?.removeAttribute("aria-invalid");
}

/** Do `work` between `busy(true)` and `busy(false)`. The alert `id` shows its error, and no earlier one. */
export async function attempt(id, work, busy = () => {}) {
  busy(true);
  settle(id);
  try {
    await work();
  } catch (error) {
    complain(id, error);
  } finally {
    busy(false);
  }
}

/** A text in quotes, or a word for a file. */
export function said(text) {
  if (!/^data:(image|audio)\//.test(text)) return `“${text}”`;
  return text[5] === "i" ? "A picture" : isWindow(text) ? "A window of sensors" : "A sound";
}

/** A sentence on the tokens at the end of a phrase that are not read; empty if all are. */
export const leftOut = (unread) => (unread ? ` The last ${unread} tokens of the phrase are not read: shorten it.` : "");

/** Do `work` when the form `id` is submitted, also by Ctrl+Enter and, on a Mac, Cmd+Enter in any of its fields. */
export function onSubmit(id, work) {
  const form = element(id);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    work();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

const WORDS = /(?<=\p{Ll}|\d)(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})|(?<=[_\-./:])(?=[^_\-./:])/u;

export const words = (label) => label.replaceAll("_", " ").trim() || label;

/** A label that may be broken between its words, as HassTurn|On and light-|turn-|on: its text, and <wbr> elements. */
export const breakable = (label) =>
  label.split(WORDS).flatMap((word, i) => (i ? [document.createElement("wbr"), word] : [word]));

const MAX_EXAMPLES = 2 ** 26; // bytes of a file
const SPLITS = ["train", "validation", "test"]; // the last one is of simulations

/** The examples in a file, or none without one: JSON lines, [{ text, label, split }], as client/training/examples.py. A label is its
 * number or its name. With `writes`, those of a language model, [{ text, prompt, split }]. Throws Error: the file is too large, or a
 * line is not an example; the message does not quote it. */
export async function readExamples(file, writes) {
  if (!file) return [];
  const { name, size } = file;
  if (size > MAX_EXAMPLES) throw new Error(`${name} is above the limit of ${MAX_EXAMPLES} bytes`);
  return (await file.text()).split("\n").flatMap((line, i) => {
    if (!line.trim()) return [];
    let found = null;
    try {
      found = JSON.parse(line);
    } catch {
      // refused below
    }
    const { text, label, prompt = "", split = "train" } = found ?? {};
    const isText = (value) => typeof value === "string" && value.isWellFormed() && [...value].length <= longest(value, 2000);
    const isLabel = typeof label === "string" || (Number.isInteger(label) && label >= 0);
    if (isText(text) && text.trim() && (writes ? isText(prompt) : isLabel) && SPLITS.includes(split)) {
      return [writes ? { text, prompt, split } : { text, label, split }];
    }
    throw new Error(`line ${i + 1} of ${name} is not an example: {"text": …${writes ? "" : ', "label": …'}}`);
  });
}
