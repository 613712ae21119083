// Text to token ids and back, by @huggingface/tokenizers, with the limits of the native session.

import { decode } from "./bytes.js";
import { DataError, quoted } from "./errors.js";
import { Tokenizer } from "./vendor/tokenizers/tokenizers.min.mjs";

const MAX_TEXT = 2 ** 16; // characters, as client/inference/text.py
const REPLACEMENT = "\ufffd"; // the text of the first bytes of a character

export class Text {
  /** `tokenizer` and `config` are the bytes of tokenizer.json and, if there is one, of tokenizer_config.json. */
  constructor(tokenizer, config) {
    const settings = JSON.parse(decode(tokenizer));
    this.limit = settings.truncation?.max_length ?? Infinity; // tokens; the library itself does not truncate
    this.tokenizer = new Tokenizer(settings, config ? JSON.parse(decode(config)) : {});
    const special = (settings.added_tokens ?? []).filter((token) => token.special && token.content);
    this.specialTokens = special.map((token) => token.content);
  }

  /**
   * The ids of a phrase with the model's special tokens, truncated at the model's limit.
   *
   * Throws DataError: the text is empty, too long, not Unicode, or has no known token.
   */
  phrase(text) {
    const plain = this.plain(checked(text));
    if (!plain.length) {
      const reason = `the text ${quoted(text, 40)} contains no known token`;
      throw new DataError(`${reason}; give a phrase in a language of the model`, "text.tokens");
    }
    const all = this.tokenizer.encode(text).ids;
    const added = all.length - plain.length;
    if (all.length <= this.limit) return all;
    const before = indexOf(plain, all);
    const after = all.slice(before + plain.length);
    return [...all.slice(0, before), ...plain.slice(0, this.limit - added), ...after];
  }

  /** The ids of a text without special tokens. Throws as `phrase`. */
  plain(text) {
    return this.tokenizer.encode(checked(text), { add_special_tokens: false }).ids;
  }

  /** The ids of a text to continue, with the special tokens that the model expects. Throws as `phrase`. */
  beginning(text) {
    return this.tokenizer.encode(checked(text)).ids;
  }

  /** A user's message. Throws as `phrase`, or if a special token in it could pose as another message. */
  message(text) {
    const token = this.specialTokens.find((each) => checked(text).includes(each));
    if (token) throw new DataError(`a message contains ${quoted(token)}, a special token of the model; remove it`, "message");
    return checked(text);
  }

  /** The text of `ids`, without a character at the end that is not complete yet. */
  decoded(ids) {
    const text = this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
    return text.endsWith(REPLACEMENT) ? text.slice(0, text.indexOf(REPLACEMENT)) : text;
  }
}

function checked(text) {
  if (!text.trim()) throw new DataError("the text is empty; give a phrase", "text");
  if (text.includes("\0")) throw new DataError("the text contains a NUL character; remove it", "text");
  if (!text.isWellFormed()) throw new DataError("the text is not valid Unicode", "text");
  if (text.length > 2 * MAX_TEXT || [...text].length > MAX_TEXT) {
    throw new DataError(`the text is above the limit of ${MAX_TEXT} characters; shorten it`, "text");
  }
  return text;
}

/** Where the array `part` begins in the array `all`. */
const indexOf = (part, all) => {
  for (let at = 0; ; at++) if (part.every((id, i) => all[at + i] === id)) return at;
};
