// The form in which a chat model wants a message, as its tokenizer_config.json says; by @huggingface/jinja.

import { decode } from "./bytes.js";
import { DataError } from "./errors.js";
import { Template } from "./vendor/jinja/index.js";

/** A function that wraps one message of a user, or null if the model's files know no chat. */
export function chatFormat(config, jinja) {
  const settings = config ? JSON.parse(decode(config)) : {};
  const source = jinja ? decode(jinja) : settings.chat_template;
  if (typeof source !== "string") return null;
  const token = (value) => (typeof value === "string" ? value : (value?.content ?? ""));
  const signs = { bos_token: token(settings.bos_token), eos_token: token(settings.eos_token) };
  const template = new Template(source);
  return (text) => {
    try {
      const messages = [{ role: "user", content: text }];
      return template.render({ ...signs, messages, add_generation_prompt: true });
    } catch (error) {
      throw new DataError(`the model's chat format cannot be applied (${error.message}); send the text as it is`);
    }
  };
}
