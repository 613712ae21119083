// Text to token ids and back, by @huggingface/tokenizers, within the limits that the native session has.

import { decode } from "./bytes.js";
import { DataError, quoted } from "./errors.js";
import { Tokenizer } from "./vendor/tokenizers/tokenizers.min.mjs";

const MAX_TEXT = 2 ** 16; // characters, as client/inference/session.py
const UNFINISHED = "\ufffd"; // what the first bytes of a longer character decode to

export class Text {
  /** `tokenizer` and `config` are the bytes of tokenizer.json and, if there is one, tokenizer_config.json. */
  constructor(tokenizer, config) {
    const settings = JSON.parse(decode(tokenizer));
    this.limit = settings.truncation?.max_length ?? Infinity; // tokens; the library itself does not cut
    this.tokenizer = new Tokenizer(settings, config ? JSON.parse(decode(config)) : {});
    this.marks = (settings.added_tokens ?? []).filter((token) => token.special && token.content).map((token) => token.content);
  }

  /**
   * The ids of a phrase with the signs that the model wants around it, cut at the model's limit.
   *
   * Throws DataError: empty, too long, not Unicode, or without a sign that the model knows.
   */
  phrase(text) {
    const plain = this.plain(checked(text));
    if (!plain.length) throw new DataError(`the text ${quoted(text, 40)} has no sign that the model knows; give a phrase`);
    const whole = this.tokenizer.encode(text).ids;
    const added = whole.length - plain.length;
    if (whole.length <= this.limit) return whole;
    const before = startOf(plain, whole);
    const after = whole.slice(before + plain.length);
    return [...whole.slice(0, before), ...plain.slice(0, this.limit - added), ...after];
  }

  /** The ids of a text as it stands. Throws as `phrase`. */
  plain(text) {
    return this.tokenizer.encode(checked(text), { add_special_tokens: false }).ids;
  }

  /** The ids of a text that is to be continued, with the signs that the model wants around it. Throws as `phrase`. */
  beginning(text) {
    return this.tokenizer.encode(checked(text)).ids;
  }

  /** A message of a user. Throws as `phrase`, and if it could pass for someone else's by the model's own marks. */
  message(text) {
    const mark = this.marks.find((each) => checked(text).includes(each));
    if (mark) throw new DataError(`a message contains ${quoted(mark)}, which is the model's own mark; leave it out`);
    return checked(text);
  }

  /** Whole characters of `ids`; those of a character that has only begun are held back. */
  decoded(ids) {
    const text = this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
    return text.endsWith(UNFINISHED) ? text.slice(0, text.indexOf(UNFINISHED)) : text;
  }
}

function checked(text) {
  if (!text.trim()) throw new DataError("an empty text has no answer; give a phrase");
  if (text.includes("\0")) throw new DataError("a text has a NUL character, where libraries take it to end; leave it out");
  if (!text.isWellFormed()) throw new DataError("a text is not valid Unicode");
  if (text.length > 2 * MAX_TEXT || [...text].length > MAX_TEXT) {
    throw new DataError(`a text above the limit of ${MAX_TEXT} characters; give a shorter one`);
  }
  return text;
}

const startOf = (part, whole) => {
  for (let at = 0; ; at++) if (part.every((id, i) => whole[at + i] === id)) return at;
};
