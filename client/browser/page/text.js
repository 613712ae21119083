// Text to token ids and back, by @huggingface/tokenizers, with the limits of the native session.

import { decode } from "./bytes.js";
import { DataError, quoted } from "./errors.js";
import { Pixels, Samples } from "./media.js";
import { Tokenizer } from "./vendor/tokenizers/tokenizers.min.mjs";

const MAX_TEXT = 2 ** 16; // characters, as client/inference/text.py
const BEGUN = "\ufffd"; // the text of the first bytes of a character
const WHITE_SPACE = ["▁", "Ġ"]; // tokens that SentencePiece and byte-level BPE write for it
const BLANK = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]/; // as Python's str.strip

/** What reads the texts of a base, or its pictures or sounds. Arguments as of `Text`. */
export function readerOf(tokenizer, config) {
  const settings = JSON.parse(decode(tokenizer));
  const Reader = { Pixels, Samples }[settings.model?.type];
  return Reader ? new Reader(settings) : new Text(settings, config);
}

export class Text {
  noun = "text";
  least = 1; // tokens

  /** `settings` are in tokenizer.json, `config` are the bytes of tokenizer_config.json, if there is one. */
  constructor(settings, config) {
    this.limit = settings.truncation?.max_length ?? Infinity; // tokens; the library itself does not truncate
    this.tokenizer = new Tokenizer(settings, config ? JSON.parse(decode(config)) : {});
    const special = (settings.added_tokens ?? []).filter((token) => token.special);
    this.specialTokens = special.map(({ content }) => content).filter(Boolean);
    this.unknown = unknownToken(settings.model);
    this.special = new Set(special.map(({ id }) => id));
    this.special.delete(this.unknown);
  }

  /** Nothing is to be prepared, but for files. */
  async prepare() {}

  /** The ids of a phrase with the model's special tokens, truncated at what the model's limit leaves after `virtual` tokens. Throws
   * DataError: the text is empty, too long, not Unicode, or has no known token (`unknownShare`); or there is no room for it. */
  phrase(text, virtual = 0) {
    const { ids, unknown } = this.#read(text, virtual);
    if (unknown === 1) {
      const reason = `the text ${quoted(text, 40)} contains no known token`;
      throw new DataError(`${reason}; give a phrase in a language of the model`, "text.tokens");
    }
    return ids;
  }

  /** The ids of a text that need not be known, with the model's special tokens; at most `most`. Throws as `unknownShare`. */
  tokens(text, most) {
    return this.#read(text, 0, most).ids;
  }

  /** The share of a text's tokens that the tokenizer does not know, 0 to 1, by the rule of the native session: special tokens and marks
   * of white space do not count, and a text without any other token has 1. Throws as `phrase`. */
  unknownShare(text) {
    return this.#read(text).unknown;
  }

  /** How many tokens at the end of a text are beyond the model's limit, or beyond `most`. Throws as `phrase`. */
  unread(text, virtual = 0, most = Infinity) {
    return this.#read(text, virtual, most).unread;
  }

  #read(text, virtual = 0, limit = Infinity) {
    const plain = this.#encode(checked(text), false);
    const all = this.#encode(text, true).map(([id]) => id);
    const most = Math.min(this.limit, limit) - virtual - (all.length - plain.length);
    if (most < 1) {
      const reason = `the adapter's ${virtual} virtual tokens leave no room for a text: the model's limit is ${this.limit}`;
      throw new DataError(`${reason}; use another adapter`, "adapter");
    }
    const before = indexOf(plain, all);
    const kept = plain.slice(0, most);
    const counted = kept.filter(([id, piece]) => !this.special.has(id) && !WHITE_SPACE.includes(piece));
    const unknown = counted.filter(([id]) => id === this.unknown).length;
    return {
      ids: [...all.slice(0, before), ...kept.map(([id]) => id), ...all.slice(before + plain.length)],
      unread: plain.length - kept.length,
      unknown: counted.length ? unknown / counted.length : 1,
    };
  }

  /** [id, token] of each token of a text; without those that have no id, which a native tokenizer omits too. */
  #encode(text, specialTokens) {
    const { ids, tokens } = this.tokenizer.encode(text, { add_special_tokens: specialTokens });
    return ids.map((id, i) => [id, tokens[i]]).filter(([id]) => id !== undefined);
  }

  /** The ids of messages that a chat template has formatted, with the special tokens that it wrote. */
  formatted(text) {
    return this.#encode(text, false).map(([id]) => id);
  }

  /** A text, and what the tokenizer makes of it before it looks for tokens: a policy judges both. */
  readings(text) {
    const { normalizer } = this.tokenizer;
    return normalizer ? [text, normalizer(text).replaceAll("▁", " ")] : [text];
  }

  /** The ids of a text to continue, with the special tokens that the model expects. Throws as `phrase`. */
  beginning(text) {
    return this.#encode(checked(text), true).map(([id]) => id);
  }

  /** A user's message. Throws as `phrase`, or if a special token in it could pose as another message. */
  message(text) {
    this.requirePlain(checked(text), "message");
    return text;
  }

  /** Return if a text, which is a `what`, has no special token. Throws DataError. */
  requirePlain(text, what) {
    const token = this.specialTokens.find((each) => text.includes(each));
    if (token) throw new DataError(`a ${what} contains ${quoted(token)}, a special token of the model; remove it`, what);
  }

  /** The text of `ids`, without a character at the end that is not complete yet. Bytes that are no character are "\ufffd". */
  decoded(ids) {
    const text = this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
    let end = text.length;
    while (text[end - 1] === BEGUN) end--; // a pattern for this is quadratic
    return text.slice(0, end);
  }

  /** A function that takes the tokens of an answer one by one, and returns the text that each completes. */
  decoder() {
    const ids = this.formatted("."); // a decoder may strip the beginning of a text, and an answer is not one
    let written = this.decoded(ids).length;
    return (id) => {
      ids.push(id);
      const piece = this.decoded(ids).slice(written);
      written += piece.length;
      return piece;
    };
  }
}

export function stripped(text) {
  let [start, end] = [0, text.length];
  while (start < end && BLANK.test(text[start])) start++;
  while (start < end && BLANK.test(text[end - 1])) end--;
  return text.slice(start, end);
}

function checked(text) {
  if (!stripped(text)) throw new DataError("the text is empty; give a phrase", "text");
  if (text.includes("\0")) throw new DataError("the text contains a NUL character; remove it", "text");
  if (!text.isWellFormed()) throw new DataError("the text is not valid Unicode", "text");
  if (text.length > 2 * MAX_TEXT || [...text].length > MAX_TEXT) {
    throw new DataError(`the text is above the limit of ${MAX_TEXT} characters; shorten it`, "text");
  }
  return text;
}

/** The id for what a tokenizer does not know, as tokenizer.json states it; undefined if it knows every text. */
function unknownToken({ unk_token: name, unk_id: number, vocab }) {
  if (name === undefined || name === null) return number ?? undefined; // the second of a Unigram model
  return Object.hasOwn(vocab, name) ? vocab[name] : undefined;
}

const indexOf = (part, all) => {
  for (let at = 0; ; at++) if (part.every(([id], i) => all[at + i] === id)) return at;
};
