// The examples of a language model as tokens, and which of them are learned, as client/training/encoding.py.

import { encode } from "../bytes.js";
import { ConfigError, DataError } from "../errors.js";

const MAX_TOKENS = 128; // of a prompt with its text

/** A text as tokens, or a prompt and the text that answers it, in the model's chat template if it has one: { ids, first, size, cut }.
 * Learned are the tokens from place `first` on: all but the first one, or those of an answer. `size`: the bytes that they stand for, at
 * least 1; `cut`: whether the text has more tokens than are learned.
 *
 * Throws ConfigError: the chat template does not begin an answer with its prompt. DataError: the prompt leaves no room, or there is a
 * special token, which could pose as another message. */
export function encoded({ text, prompt = "" }, { text: tokenizer, chat, limit, ends }) {
  for (const each of [prompt, text]) tokenizer.requirePlain(each, "text");
  const [before, after] = rendered(text, prompt, chat);
  const [asked, own] = [before ? tokenizer.formatted(before) : [], tokenizer.formatted(text)];
  const closing = after ? tokenizer.formatted(after) : [ends.values().next().value];
  const ids = [...asked, ...own, ...closing];
  const [first, longest] = [Math.max(asked.length, 1), Math.min(MAX_TOKENS, limit)];
  if (ids.length <= first || first >= longest) {
    throw new DataError(`the prompt leaves no room for its text within ${longest} tokens: shorten it`, "text");
  }
  const bytes = (tokens) => (tokens.length ? encode(tokenizer.decoded(tokens)).length : 0);
  const kept = longest - asked.length;
  const end = kept < own.length ? bytes(own.slice(0, kept)) : encode(text).length;
  const size = Math.max(end - bytes(own.slice(0, first - asked.length)), 1);
  return { ids: ids.slice(0, longest), first, size, cut: ids.length > longest };
}

/** What comes before a text, and what closes it: nothing without a template. */
function rendered(text, prompt, chat) {
  if (!prompt || !chat) return [prompt, ""];
  const asked = { role: "user", content: prompt };
  const before = chat([asked]);
  const whole = chat([asked, { role: "assistant", content: text }], false);
  if (whole.startsWith(before + text)) return [before, whole.slice(before.length + text.length)];
  throw new ConfigError("the base's chat template changes a prompt or a text", "chat_template");
}
