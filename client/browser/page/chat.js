// Formats the messages of a chat with the template of the model's tokenizer_config.json, by @huggingface/jinja.

import { decode } from "./bytes.js";
import { DataError } from "./errors.js";
import { Template } from "./vendor/jinja/index.js";

/**
 * A function that formats messages, [{ role, content }], up to where the next answer begins, or with `answer` false up to
 * their end; null without a template.
 */
export function chatTemplate(config, jinja) {
  const settings = config ? JSON.parse(decode(config)) : {};
  const source = jinja ? decode(jinja) : settings.chat_template;
  if (typeof source !== "string") return null;
  const token = (value) => (typeof value === "string" ? value : (value?.content ?? ""));
  const tokens = { bos_token: token(settings.bos_token), eos_token: token(settings.eos_token) };
  const template = new Template(source);
  return (messages, answer = true) => {
    try {
      return template.render({ ...tokens, messages, add_generation_prompt: answer });
    } catch (error) {
      const reason = `the model's chat template does not accept the messages (${error.message})`;
      const remedy = "start a new conversation without a system prompt, or send plain text";
      throw new DataError(`${reason}; ${remedy}`, "chat_template");
    }
  };
}
