// Text generation with a KV cache: one forward pass for the prompt, then one for each new token.
//
// The names of the graph's inputs, the shape of its cache and the end-of-text tokens are read from genai_config.json, as
// onnxruntime-genai reads them on other devices.

import { decode } from "./bytes.js";
import { chatTemplate } from "./chat.js";
import { DataError } from "./errors.js";
import * as runtime from "./runtime.js";
import { sample } from "./sampling.js";
import { GENERATION } from "./trust.js";

export class Generation {
  constructor(session, text, files) {
    const { model } = JSON.parse(decode(files.get(GENERATION)));
    const { decoder } = model;
    Object.assign(this, { session, text, limit: model.context_length });
    this.inputs = decoder.inputs;
    this.outputs = decoder.outputs;
    this.layers = Array.from({ length: decoder.num_hidden_layers }, (_, i) => String(i));
    this.empty = [1, decoder.num_key_value_heads, 0, decoder.head_size];
    this.ends = new Set([model.eos_token_id].flat());
    this.chat = chatTemplate(files.get("tokenizer_config.json"), files.get("chat_template.jinja"));
    this.declared = new Set(session.inputNames);
  }

  /**
   * Continue a prompt with the inputs of an adapter; with `chat`, answer it as a message, if the model has a template.
   *
   * Yields { id, text }: each new token, and the text that it completes. Ends after `maxTokens`, at an end-of-text token,
   * or when the model's context is full. A consumer that stops reading stops the generation.
   *
   * Throws DataError: the prompt is empty or too long, or a logit is not finite.
   */
  async *pieces(prompt, feeds, { maxTokens, chat = false, temperature = 0, topP = 1, random }) {
    const ids = this.#prompt(prompt, chat);
    const state = { length: 0, cache: this.#cache() };
    const [generated, decoded] = [[], { text: "" }];
    let next = ids;
    while (generated.length < maxTokens && ids.length + generated.length < this.limit) {
      const id = sample(await this.#logits(next, state, feeds), { temperature, topP, random });
      if (this.ends.has(id)) return;
      generated.push(id);
      next = [id];
      yield { id, text: this.#piece(generated, decoded) };
    }
  }

  #prompt(prompt, chat) {
    const { text } = this;
    const ids = chat && this.chat ? text.plain(this.chat(text.message(prompt))) : text.beginning(prompt);
    if (!ids.length) throw new DataError("the prompt contains no known token; write another one", "text.tokens");
    if (ids.length >= this.limit) {
      const reason = `the prompt has ${ids.length} tokens, and the model's limit is ${this.limit}; shorten it`;
      throw new DataError(reason, "prompt");
    }
    return ids;
  }

  #cache() {
    const both = [this.inputs.past_key_names, this.inputs.past_value_names];
    const names = both.flatMap((pattern) => this.layers.map((layer) => pattern.replace("%d", layer)));
    return Object.fromEntries(names.map((name) => [name, runtime.floats(new Float32Array(0), this.empty)]));
  }

  /** The logits of the token that follows `ids`; `state` is updated. */
  async #logits(ids, state, feeds) {
    const total = state.length + ids.length;
    const tokens = {
      [this.inputs.input_ids]: runtime.int64(ids),
      [this.inputs.attention_mask]: runtime.int64(new Array(total).fill(1)),
      [this.inputs.position_ids]: runtime.int64(ids.map((_, i) => state.length + i)),
    };
    const wanted = Object.entries(tokens).filter(([name]) => this.declared.has(name));
    const found = await runtime.run(this.session, { ...Object.fromEntries(wanted), ...state.cache, ...feeds });
    state.length = total;
    state.cache = this.#nextCache(found);
    const logits = found[this.outputs.logits];
    return logits.data.subarray(logits.data.length - logits.dims.at(-1));
  }

  #nextCache(found) {
    const pairs = [
      [this.inputs.past_key_names, this.outputs.present_key_names],
      [this.inputs.past_value_names, this.outputs.present_value_names],
    ];
    const entries = pairs.flatMap(([past, present]) =>
      this.layers.map((layer) => [past.replace("%d", layer), found[present.replace("%d", layer)]]),
    );
    return Object.fromEntries(entries);
  }

  #piece(ids, decoded) {
    const text = this.text.decoded(ids);
    const piece = text.slice(decoded.text.length);
    decoded.text = text;
    return piece;
  }
}
