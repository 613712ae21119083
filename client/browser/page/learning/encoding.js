// The examples of a language model as tokens, and which of them are learned, as client/training/encoding.py.

import { encode } from "../bytes.js";
import { ConfigError, DataError } from "../errors.js";

const MAX_TOKENS = 128; // of a prompt with its answer

/**
 * A prompt and its answer as tokens, in the model's chat template if it has one: { ids, first, size, cut }. Only the answer is
 * learned: the tokens from place `first` on. `size`: its bytes; `cut`: whether it has more tokens than are learned.
 *
 * Throws ConfigError: the chat template does not begin an answer with its prompt. DataError: the prompt leaves no room.
 */
export function encoded({ prompt, answer }, { text, chat, limit, ends }) {
  const [before, after] = rendered(prompt, answer, chat);
  const asked = text.formatted(before);
  const closing = after ? text.formatted(after) : [ends.values().next().value];
  const ids = [...asked, ...text.formatted(answer), ...closing];
  const [first, longest] = [Math.max(asked.length, 1), Math.min(MAX_TOKENS, limit)];
  if (ids.length <= first || first >= longest) {
    throw new DataError(`the message leaves no room for its answer within ${longest} tokens: shorten it`, "text");
  }
  return { ids: ids.slice(0, longest), first, size: encode(answer).length, cut: ids.length > longest };
}

/** What comes before an answer, and what closes it: nothing without a template. */
function rendered(prompt, answer, chat) {
  if (!chat) return [prompt, ""];
  const asked = { role: "user", content: prompt };
  const before = chat([asked]);
  const whole = chat([asked, { role: "assistant", content: answer }], false);
  if (whole.startsWith(before + answer)) return [before, whole.slice(before.length + answer.length)];
  throw new ConfigError("the base's chat template changes a message or an answer", "chat_template");
}
