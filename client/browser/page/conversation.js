// The messages of a chat with a language model: the counterpart of Conversation in client/inference/generate.py.

import { ConfigError, DataError } from "./errors.js";
import { virtualTokens } from "./graphinputs.js";

/**
 * The model reads the system prompt and as many of the last messages as leave room for an answer of `maxTokens`; the
 * oldest are dropped, each question with its answer. After a change of adapter the conversation goes on: the new adapter
 * reads the same messages.
 */
export class Conversation {
  #messages = [];

  /** `generation` answers. */
  constructor(generation) {
    this.generation = generation;
  }

  /** The number of messages that the model would read now, without the system prompt. */
  get length() {
    return this.#messages.length;
  }

  /** Drop all messages. */
  reset() {
    this.#messages = [];
  }

  /**
   * Answer `text` with the inputs of an adapter, as `Generation.pieces`. If the answer is not read to its end, the part
   * that was read is kept; an empty answer and its question are not.
   *
   * Throws DataError: the text or the system prompt is not a valid message, or is too long even without the messages
   * before it. The messages are then unchanged. ConfigError: an answer of `maxTokens` leaves no room for a question.
   */
  async *ask(text, feeds, { system = "", ...options }) {
    const first = system.trim() ? [{ role: "system", content: system }] : [];
    const all = [...this.#messages, { role: "user", content: text }];
    const { messages, ids } = this.#fit(first, all, options.maxTokens, virtualTokens(feeds));
    let answer = "";
    try {
      for await (const piece of this.generation.pieces(ids, feeds, options)) {
        answer += piece.text;
        yield piece;
      }
    } finally {
      if (answer.trim()) this.#messages = [...messages, { role: "assistant", content: answer }];
    }
  }

  #fit(first, all, maxTokens, virtual) {
    const limit = this.generation.limit - maxTokens - virtual;
    if (limit < 1) {
      const reason = `an answer of ${maxTokens} tokens leaves no room for a question: the model's limit is`;
      throw new ConfigError(`${reason} ${this.generation.limit} tokens; lower Max tokens`, "maxTokens");
    }
    for (let messages = all; ; messages = messages.slice(2)) {
      const ids = this.generation.messageIds([...first, ...messages]);
      if (ids.length <= limit) return { messages, ids };
      if (messages.length < 3) {
        const reason = `the message needs ${ids.length} tokens, and an answer of ${maxTokens} leaves ${limit}`;
        throw new DataError(`${reason}; shorten it, or lower Max tokens`, "prompt");
      }
    }
  }
}
