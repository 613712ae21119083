// Reads and writes DER (X.690), of which certificates, revocation lists and requests need a small part. Throws SyntaxError for anything else.

import { concat, decode, hex } from "../bytes.js";

const TAGS = { BOOLEAN: 0x01, INTEGER: 0x02, BITS: 0x03, OCTETS: 0x04, OID: 0x06, SEQUENCE: 0x30, SET: 0x31 };
const [UTC_TIME, GENERALIZED_TIME] = [0x17, 0x18];

export class Der {
  #bytes;
  #at = 0;

  constructor(bytes) {
    this.#bytes = bytes;
  }

  get done() {
    return this.#at === this.#bytes.length;
  }

  /** The tag of the next element; null at the end. */
  get next() {
    return this.done ? null : this.#bytes[this.#at];
  }

  /** The next element, of any tag: { tag, content, whole }, where `whole` includes tag and length. */
  any() {
    const start = this.#at;
    const [tag, first] = [this.#byte(), this.#byte()];
    if ((tag & 0x1f) === 0x1f) throw new SyntaxError("a tag of several bytes");
    let size = first;
    if (first & 0x80) {
      const octets = first & 0x7f;
      if (octets < 1 || octets > 3) throw new SyntaxError("a length that is indefinite, or too long");
      size = 0;
      for (let i = 0; i < octets; i++) size = size * 256 + this.#byte();
      if (size < 0x80 || size < 256 ** (octets - 1)) throw new SyntaxError("a length in a longer form than needed");
    }
    if (size > this.#bytes.length - this.#at) throw new SyntaxError("an element is truncated");
    const content = this.#bytes.subarray(this.#at, this.#at + size);
    this.#at += size;
    return { tag, content, whole: this.#bytes.subarray(start, this.#at) };
  }

  /** The content of the next element, of the tag with this name or number. */
  take(tag) {
    const found = this.any();
    if (found.tag !== (TAGS[tag] ?? tag)) throw new SyntaxError(`tag ${found.tag}, not ${tag}`);
    return found.content;
  }

  sequence() {
    return new Der(this.take("SEQUENCE"));
  }

  /** The sequence that is next, or an empty one. */
  optional() {
    return this.next === TAGS.SEQUENCE ? this.sequence() : new Der(new Uint8Array());
  }

  /** The sequence in an element of this tag, if that is next; else an empty one. */
  within(tag) {
    return this.next === tag ? new Der(this.take(tag)).sequence() : new Der(new Uint8Array());
  }

  /** A non-negative integer, a BigInt. */
  integer() {
    const raw = this.take("INTEGER");
    if (!raw.length || raw[0] & 0x80 || (raw.length > 1 && !raw[0] && !(raw[1] & 0x80))) {
      throw new SyntaxError("an integer that is negative, or not in its shortest form");
    }
    return raw.reduce((value, byte) => value * 256n + BigInt(byte), 0n);
  }

  /** A boolean; false if the next element is another. */
  flag() {
    if (this.next !== TAGS.BOOLEAN) return false;
    const [value, ...more] = this.take("BOOLEAN");
    if (more.length || (value !== 0 && value !== 0xff)) throw new SyntaxError("a boolean that is neither true nor false");
    return value === 0xff;
  }

  /** The bytes of a bit string without unused bits. */
  bits() {
    const [unused, ...bytes] = this.take("BITS");
    if (unused !== 0) throw new SyntaxError("a bit string with unused bits");
    return Uint8Array.from(bytes);
  }

  /** An object identifier as hexadecimal digits of its content. */
  oid() {
    return hex(this.take("OID"));
  }

  /** A time in milliseconds (RFC 5280, section 4.1.2.5): in UTC, to the second. */
  time() {
    const { tag, content } = this.any();
    const match = /^(\d{2}|\d{4})(\d{2})(\d{2})(\d{2})(\d{2})(\d{2})Z$/.exec(decode(content));
    if (!match || match[1].length !== { [UTC_TIME]: 2, [GENERALIZED_TIME]: 4 }[tag]) throw new SyntaxError("not a time");
    const [year, month, day, ...clock] = match.slice(1);
    const full = tag === UTC_TIME ? (year < "50" ? "20" : "19") + year : year;
    const text = `${full}-${month}-${day}T${clock.join(":")}.000Z`;
    const found = new Date(text);
    if (Number.isNaN(found.getTime()) || found.toISOString() !== text) throw new SyntaxError("no such time"); // it may roll over
    return found.getTime();
  }

  end() {
    if (!this.done) throw new SyntaxError("bytes are left over");
  }

  #byte() {
    if (this.done) throw new SyntaxError("an element is truncated");
    return this.#bytes[this.#at++];
  }
}

/** An element of the tag with this name or number, with less than 2^16 bytes. */
export function der(tag, ...parts) {
  const content = concat(...parts);
  const size = content.length;
  const length = size < 0x80 ? [size] : size < 0x100 ? [0x81, size] : [0x82, size >> 8, size & 0xff];
  return concat([TAGS[tag] ?? tag, ...length], content);
}
