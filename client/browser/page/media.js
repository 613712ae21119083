// Files as texts, as edgeadapt/bases/media.py: a data URI of a small file, whose tokens are its pixels or samples.

import { DataError, translated } from "./errors.js";

const MAX_MEDIUM = 2 ** 18; // characters
const MAX_KEPT = 2 ** 26; // bytes of decoded files in memory

/** The most characters of a text, which may be a file, if it has at most `most` else. */
export const longest = (text, most) => (/^data:(image|audio)\//.test(text) ? MAX_MEDIUM : most);

/** Reads files as `Text` reads texts. They are decoded by `prepare`, before the others are called. */
export class Files {
  #kept = new Map(); // text → numbers, the last used ones last
  #size = 0;
  #kind;

  /** `kind`: `noun`, the `kinds` of files, and the form of a `uri`; `size`: numbers of each file. */
  constructor(kind, size) {
    this.#kind = kind;
    this.noun = kind.noun;
    this.limit = this.least = size;
  }

  /** What `check` says of the fields of tokenizer.json. Throws DataError: they are not whole numbers, or it says no. */
  static stated(noun, fields, check) {
    if (!Object.values(fields).every(Number.isInteger) || !check) {
      throw new DataError(`tokenizer.json states no size of ${noun}s: copy the base again`, "tokenizer.json");
    }
    return fields;
  }

  /** Decode texts. Throws DataError: one is of another kind, too large or damaged. */
  async prepare(texts) {
    for (const text of texts) {
      const numbers = this.#kept.get(text) ?? (await this.#read(text));
      if (!this.#kept.delete(text)) this.#size += numbers.byteLength;
      this.#kept.set(text, numbers);
    }
    for (const [oldest, { byteLength }] of this.#kept) {
      if (this.#size <= MAX_KEPT || texts.includes(oldest)) break;
      this.#kept.delete(oldest);
      this.#size -= byteLength;
    }
  }

  /** The numbers of a prepared text. Throws DataError. */
  phrase(text) {
    const numbers = this.#kept.get(text);
    if (!numbers) throw this.#foreign();
    return numbers;
  }

  tokens = (text) => this.phrase(text);
  unknownShare = () => 0;
  unread = () => 0;

  #foreign = () => new DataError(`this base reads ${this.noun}s: give ${this.#kind.kinds}`, this.noun);

  async #read(text) {
    const { noun } = this;
    if (!this.#kind.uri.test(text)) throw this.#foreign();
    if (text.length > MAX_MEDIUM) {
      throw new DataError(`the ${noun} has ${text.length} characters, above the limit of ${MAX_MEDIUM}: reduce it`, noun);
    }
    const binary = translated(() => atob(text.slice(text.indexOf(",") + 1)), () => new DataError(`the ${noun} is not in base64`, noun));
    return this.decoded(Uint8Array.from(binary, (char) => char.charCodeAt(0)));
  }
}
