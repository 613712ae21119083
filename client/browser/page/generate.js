// Text generation with a KV cache: one forward pass for the prompt, then one for each new token. The cache is kept after a text: of a
// prompt that begins with the same tokens, as the next message of a chat does, only the rest is read. Another adapter reads everything
// again, since its keys and values are others. The names of the graph's inputs, the shape of its cache and the end-of-text tokens are read
// from genai_config.json, as onnxruntime-genai reads them on other devices.

import { decode } from "./bytes.js";
import { ConfigError, DataError, translated } from "./errors.js";
import { virtualTokens } from "./graphinputs.js";
import { governed, policyOf } from "./policy.js";
import * as runtime from "./runtime.js";
import { sample } from "./sampling.js";
import { GENERATION } from "./trust.js";
import { Template } from "./vendor/jinja/index.js";

const PROBE = 256; // tokens, of which a shader's ways for short and for long texts are found out

const settingsOf = (files) => JSON.parse(decode(files.get(GENERATION))).model;

/** The KV cache of a graph: [input, output] of the keys and of the values of each layer. */
function cacheNames({ inputs, outputs, num_hidden_layers: layers }) {
  const pairs = [[inputs.past_key_names, outputs.present_key_names], [inputs.past_value_names, outputs.present_value_names]];
  const ofLayer = (layer) => pairs.map((pair) => pair.map((pattern) => pattern.replace("%d", layer)));
  return Array.from({ length: layers }, (_, i) => ofLayer(String(i))).flat();
}

/** The outputs of a base that are its KV cache, from its verified files. */
export const cacheOutputs = (files) => cacheNames(settingsOf(files).decoder).map(([, output]) => output);

export class Generation {
  last = null; // of the last text: { finish, tokens, prompt, reused }, the last two in tokens of its prompt
  #read; // { feeds, ids, cache }: what the cache holds, and whose inputs it was read with

  constructor(session, text, files) {
    const model = settingsOf(files);
    const { decoder } = model;
    this.policy = policyOf(files);
    Object.assign(this, { session, text, limit: model.context_length }); // tokens, prompt and answer together
    this.inputs = decoder.inputs;
    this.outputs = decoder.outputs;
    this.cached = cacheNames(decoder);
    this.empty = [1, decoder.num_key_value_heads, 0, decoder.head_size];
    this.ends = new Set([model.eos_token_id].flat());
    this.vocabulary = model.vocab_size;
    this.chat = chatTemplate(files.get("tokenizer_config.json"), files.get("chat_template.jinja"));
    this.declared = new Set(session.inputNames);
    this.#forget();
  }

  /** The ids of a text to continue, after `virtual` tokens. Throws DataError: it is empty, has no known token, or leaves no room for
   * more. */
  promptIds(text, virtual = 0) {
    const ids = this.text.beginning(text);
    if (!ids.length) throw new DataError("the prompt contains no known token; write another one", "text.tokens");
    if (ids.length + virtual >= this.limit) {
      const before = virtual ? ` after ${virtual} virtual ones` : "";
      const reason = `the prompt has ${ids.length} tokens${before}, and the model's limit is ${this.limit}; shorten it`;
      throw new DataError(reason, "prompt");
    }
    return ids;
  }

  /** The ids of a chat, [{ role, content }], up to where the answer begins. Throws DataError: a message is empty or has a special token
   * of the model, or the template does not accept them. ConfigError: the model has no chat template. */
  messageIds(messages) {
    if (!this.chat) throw new ConfigError("this model has no chat template; send plain text", "chat_template");
    const checked = messages.map(({ role, content }) => ({ role, content: this.text.message(content) }));
    return this.text.formatted(this.chat(checked));
  }

  /** Continue a prompt, given as ids, with the inputs of an adapter. A placeholder before it for each virtual token, which the graph does
   * not read, repeats its first id.
   *
   * Yields { id, text }: each new token, and the text that it completes, as the policy lets an answer to `asked` be given. Ends after
   * `maxTokens`, at an end-of-text token, or when the model's context is full; `last` says which. A consumer that stops reading stops the
   * generation.
   *
   * Throws DataError: a logit is not finite, or the graph does not run. */
  pieces(prompt, feeds, { asked, ...options }) {
    return governed(this.policy, this.text.readings(asked), this, this.#written(prompt, feeds, options));
  }

  async *#written(prompt, feeds, { maxTokens, temperature = 0, topP = 1, random }) {
    const virtual = virtualTokens(feeds);
    const ids = [...new Array(virtual).fill(prompt[0]), ...prompt];
    const reused = await this.#rewind(ids, feeds);
    this.last = { finish: "interrupted", tokens: 0, prompt: prompt.length, reused: Math.max(0, reused - virtual) };
    const [generated, decoded] = [[], this.text.decoder()];
    let next = ids.slice(reused);
    while (generated.length < maxTokens && ids.length + generated.length < this.limit) {
      const id = sample(await this.#logits(next, feeds), { temperature, topP, random });
      if (this.ends.has(id)) return void (this.last.finish = "end");
      generated.push(id);
      next = [id];
      this.last.tokens += 1;
      yield { id, text: decoded(id) };
    }
    this.last.finish = generated.length < maxTokens ? "context" : "length";
  }

  /** The logits after fixed tokens, read at once and then one by one: a Float32Array for each reading. */
  async probe(feeds) {
    this.#forget();
    const found = [];
    const length = Math.min(PROBE, this.limit - 2);
    const ids = Array.from({ length }, (_, i) => i % 8); // which every vocabulary has
    for (const read of [ids.slice(0, 8), ids.slice(8), [1], [2]]) found.push((await this.#logits(read, feeds)).slice());
    this.#forget();
    return found;
  }

  close() {
    this.#keep(null);
  }

  #forget() {
    const cache = this.cached.map(([input]) => [input, runtime.floats(new Float32Array(0), this.empty)]);
    this.#keep({ feeds: null, ids: [], cache: Object.fromEntries(cache) });
  }

  #keep(read) {
    for (const tensor of Object.values(this.#read?.cache ?? {})) runtime.release(tensor);
    this.#read = read;
  }

  /** Keep of the cache what a prompt begins with, except its last token, whose logits are needed; return how much. */
  async #rewind(ids, feeds) {
    const { feeds: before, ids: read, cache } = this.#read;
    const differs = ids.slice(0, -1).findIndex((id, i) => id !== read[i]);
    const known = feeds !== before ? 0 : differs < 0 ? ids.length - 1 : differs;
    if (!known) this.#forget();
    else if (known < read.length) {
      const cut = Object.entries(cache).map(async ([name, tensor]) => [name, await runtime.beginning(tensor, known)]);
      this.#keep({ feeds, ids: read.slice(0, known), cache: Object.fromEntries(await Promise.all(cut)) });
    }
    this.#read.feeds = feeds;
    return known;
  }

  /** The logits of the token that follows `ids`, which are added to the cache. */
  async #logits(ids, feeds) {
    const { ids: read, cache } = this.#read;
    const total = read.length + ids.length;
    const tokens = {
      [this.inputs.input_ids]: runtime.int64(ids),
      [this.inputs.attention_mask]: runtime.int64(new Array(total).fill(1)),
      [this.inputs.position_ids]: runtime.int64(ids.map((_, i) => read.length + i)),
    };
    const wanted = Object.entries(tokens).filter(([name]) => this.declared.has(name));
    const found = await runtime.run(this.session, { ...Object.fromEntries(wanted), ...cache, ...feeds });
    const next = this.cached.map(([input, output]) => [input, found[output]]);
    this.#keep({ feeds, ids: [...read, ...ids], cache: Object.fromEntries(next) });
    const logits = found[this.outputs.logits];
    return logits.data.subarray(logits.data.length - logits.dims.at(-1));
  }
}

/** A function that formats messages, [{ role, content }], by the template in the model's tokenizer_config.json (@huggingface/jinja), up
 * to where the next answer begins, or with `answer` false up to their end; null without a template. */
function chatTemplate(config, jinja) {
  const settings = config ? JSON.parse(decode(config)) : {};
  const source = jinja ? decode(jinja) : settings.chat_template;
  if (typeof source !== "string") return null;
  const token = (value) => (typeof value === "string" ? value : (value?.content ?? ""));
  const tokens = { bos_token: token(settings.bos_token), eos_token: token(settings.eos_token) };
  const template = new Template(source);
  const refusal = ({ message }) => {
    const remedy = "start a new conversation without a system prompt, or send plain text";
    return new DataError(`the model's chat template does not accept the messages (${message}); ${remedy}`, "chat_template");
  };
  return (messages, answer = true) =>
    translated(() => template.render({ ...tokens, messages, add_generation_prompt: answer }), refusal);
}

/** The model reads the system prompt and as many of the last messages as leave room for an answer of `maxTokens`; the oldest are dropped,
 * each question with its answer. After a change of adapter the conversation goes on: the new adapter reads the same messages. */
export class Conversation {
  #messages = [];

  constructor(generation) {
    this.generation = generation;
  }

  /** The number of messages that the model would read now, without the system prompt. */
  get length() {
    return this.#messages.length;
  }

  reset() {
    this.#messages = [];
  }

  /** Answer `text` with the inputs of an adapter, as `Generation.pieces`. If the answer is not read to its end, the part that was read is
   * kept; an empty answer and its question are not.
   *
   * Throws DataError: the text or the system prompt is not a valid message, or is too long even without the messages before it. The
   * messages are then unchanged. ConfigError: an answer of `maxTokens` leaves no room for a question. */
  async *ask(text, feeds, { system = "", ...options }) {
    const first = system.trim() ? [{ role: "system", content: system }] : [];
    const all = [...this.#messages, { role: "user", content: text }];
    const { messages, ids } = this.#fit(first, all, options.maxTokens, virtualTokens(feeds));
    let answer = "";
    try {
      for await (const piece of this.generation.pieces(ids, feeds, { ...options, asked: text })) {
        answer += piece.text;
        yield piece;
      }
    } finally {
      const blocked = this.generation.last?.finish === "blocked"; // which is not read again
      if (answer.trim() && !blocked) this.#messages = [...messages, { role: "assistant", content: answer }];
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
