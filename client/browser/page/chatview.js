// The part of the page that writes text: a chat of several messages, or the continuation of a text.

import { complain, create, element, onSubmit, settle } from "./dom.js";

const MOST_TOKENS = 256; // of an answer, unless the user says otherwise
const ENDS = {
  length: ", up to Max tokens",
  context: ", until the model's context was full",
  interrupted: " (stopped)",
  blocked: ", withheld by the policy of the bundle",
};

export class ChatView {
  #busy = false;
  #messages = []; // the elements of the messages that are in the conversation

  /** `adapter` returns the name of the adapter in use; `correct` is called with a message and its answer that is not right. */
  constructor(client, adapter, correct) {
    Object.assign(this, { client, adapter, correct });
    onSubmit("generate-form", () => this.#send());
    // A field that is not shown cannot say what is wrong with it.
    element("generate-form").addEventListener("invalid", () => (element("sampling").open = true), true);
    element("stop").addEventListener("click", () => client.stop());
    element("new-chat").addEventListener("click", () => this.#restart());
    element("chat").addEventListener("change", () => this.#restart());
  }

  show({ chat, context, trainable }) {
    Object.assign(this, { context, trainable, formats: chat });
    element("chat").checked = chat;
    element("chat-choice").hidden = !chat;
    element("max-tokens").max = Math.max(1, context - 1);
    element("max-tokens").value = Math.min(MOST_TOKENS, Math.max(1, Math.floor(context / 2)));
    const limit = context.toLocaleString("en");
    element("context").textContent = `The model reads at most ${limit} tokens, the answer included.`;
    this.#clear();
  }

  /** Another adapter is going to answer: end the text that is being written. */
  switching() {
    this.client.stop();
    if (!element("chat").checked) this.#clear();
  }

  async #restart() {
    this.client.stop();
    await this.client.reset();
    this.#clear();
    element("prompt").focus();
  }

  #clear() {
    this.#messages = [];
    element("transcript").replaceChildren();
    const chat = element("chat").checked;
    for (const id of ["system-field", "new-chat"]) element(id).hidden = !chat;
    element("prompt-label").textContent = chat ? "Message" : "Text to continue";
    element("generate-button").textContent = chat ? "Send" : "Continue";
    settle("generate-error", element("prompt"));
  }

  async #send() {
    if (this.#busy) return;
    const [field, chat] = [element("prompt"), element("chat").checked];
    const number = (id) => Number(element(id).value);
    const options = {
      ...{ prompt: field.value, chat, system: element("system").value, maxTokens: number("max-tokens") },
      ...{ temperature: number("temperature"), topP: number("top-p"), seed: number("seed") },
    };
    settle("generate-error", field);
    const transcript = element("transcript");
    if (!chat) transcript.replaceChildren();
    const pair = [
      message("user", chat ? "You" : "Text", field.value),
      message("assistant", this.adapter() || "the base alone", ""),
    ];
    transcript.append(...pair);
    transcript.scrollTop = transcript.scrollHeight;
    field.value = chat ? "" : field.value;
    this.#setBusy(true);
    try {
      const done = await this.client.generate(options, ({ text }) => this.#scrolled(() => pair[1].querySelector("p").append(text)));
      this.#ended(pair, done, chat);
    } catch (error) {
      if (!pair[1].lastChild.textContent) for (const each of pair) each.remove();
      field.value ||= options.prompt; // so that it can be corrected
      complain("generate-error", error, field);
    }
    this.#setBusy(false);
  }

  #ended(pair, done, chat) {
    const [, answer] = pair;
    const empty = done.finish === "blocked" || !answer.querySelector("p").textContent.trim();
    const lost = chat && empty ? " This answer and its message are not part of the conversation." : "";
    const count = done.tokens === 1 ? "1 token" : `${done.tokens} tokens`;
    const shown = [create("small", { title: speed(done) }, `${count}${ENDS[done.finish] ?? ""}.${lost}`)];
    // A lesson formats a message as a chat does, if the model has a format.
    if (this.trainable && chat === this.formats) shown.push(this.#button(...pair));
    this.#scrolled(() => answer.append(...shown));
    if (!chat) return;
    if (!empty) this.#messages.push(...pair);
    this.#markForgotten(done.remembered);
  }

  #button(...pair) {
    const button = create("button", { type: "button" }, "Correct this answer");
    button.addEventListener("click", () => this.correct(...pair.map((each) => each.querySelector("p").textContent)));
    return button;
  }

  /** A line above the first message that the model still reads, if it no longer reads all. */
  #markForgotten(remembered) {
    document.getElementById("forgotten")?.remove();
    const first = this.#messages.length - remembered;
    if (first <= 0) return;
    const text = `The model's context of ${this.context} tokens is full: it no longer reads what is above this line.`;
    this.#messages[first].before(create("li", { id: "forgotten" }, text));
  }

  #setBusy(busy) {
    this.#busy = busy;
    element("generate-button").disabled = busy;
    element("stop").disabled = !busy;
    element("transcript").setAttribute("aria-busy", String(busy)); // announced as a whole, not token by token
  }

  /** Change the transcript, and keep its end in view if it was. */
  #scrolled(change) {
    const list = element("transcript");
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    change();
    if (atEnd) list.scrollTop = list.scrollHeight;
  }
}

const message = (role, name, text) => create("li", { "data-role": role }, create("strong", {}, name), create("p", {}, text));

function speed({ tokens, prompt, reused, first, milliseconds }) {
  const rate = tokens > 1 ? `, then ${((1000 * (tokens - 1)) / (milliseconds - first)).toFixed(1)} tokens/s` : "";
  const cached = reused ? `, ${reused} of ${prompt} tokens before it from the cache` : "";
  return `the first token after ${first.toFixed(0)} ms${rate}${cached}`;
}
