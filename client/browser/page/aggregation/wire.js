// The canonical encoding, as aggregation/wire.py: each value has exactly one byte string, each accepted one exactly one value. A codec is {
// write(value) → bytes, read(source) }. Every length is checked against its limit and against the bytes present before anything is allocated.
// Reading arbitrary bytes returns a value or throws ProtocolError. Integers of up to 32 bits are numbers, those of 64 bits are BigInts;
// maps are Maps, because "constructor" is a device id.

import { concat } from "../bytes.js";
import { ConfigError, ProtocolError, quoted } from "../errors.js";

/** A cursor over bytes that never reads past their end. */
class Reader {
  #data;
  #at = 0;

  constructor(data) {
    this.#data = data;
  }

  get left() {
    return this.#data.length - this.#at;
  }

  take(n) {
    if (n > this.left) {
      throw new ProtocolError(`message is truncated: ${n} bytes expected, ${this.left} left`, "encoding.length");
    }
    this.#at += n;
    return this.#data.subarray(this.#at - n, this.#at);
  }
}

/** The canonical bytes of `value`. Throws ConfigError: a field is over its limit. */
export const encode = (codec, value) => codec.write(value);

/** The value that `raw` encodes. Throws ProtocolError: not the canonical encoding of one value. */
export function decode(codec, raw) {
  const source = new Reader(raw);
  const value = codec.read(source);
  if (source.left) throw new ProtocolError(`${source.left} bytes left over after the message`, "encoding.trailing");
  return value;
}

const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.length);

/** `value` in 4 bytes, big-endian. */
export function u32(value) {
  const bytes = new Uint8Array(4);
  view(bytes).setUint32(0, value);
  return bytes;
}

/** An unsigned integer of 8 or 32 bits, big-endian. */
export function uint(bits) {
  const size = bits / 8;
  return {
    write(value) {
      if (!Number.isInteger(value) || value < 0 || value >= 2 ** bits) throw tooLarge(value, bits);
      return u32(value).subarray(4 - size);
    },
    read: (source) => source.take(size).reduce((value, byte) => value * 256 + byte, 0),
  };
}

/** An unsigned integer of 64 bits, a BigInt. */
export const uint64 = {
  write(value) {
    if (value < 0n || value >= 2n ** 64n) throw tooLarge(value, 64);
    const bytes = new Uint8Array(8);
    view(bytes).setBigUint64(0, value);
    return bytes;
  },
  read: (source) => view(source.take(8)).getBigUint64(0),
};

const tooLarge = (value, bits) => new ConfigError(`${value} does not fit an unsigned field of ${bits} bits`, "encoding.uint");

/** Exactly `size` bytes, without a length. */
export function fixed(size) {
  return {
    write(value) {
      if (value.length !== size) throw new ConfigError(`${value.length} bytes in a field of exactly ${size}`, "encoding.fixed");
      return value;
    },
    read: (source) => source.take(size),
  };
}

/** At most `limit` bytes after their length in 4 bytes. */
export const blob = (limit) => ({
  write: (value) => concat(count(value.length, limit), value),
  read: (source) => source.take(readCount(source, limit)),
});

/** ASCII text of at most 255 characters that `pattern` matches in full, after its length in 1 byte. */
export function text(pattern) {
  const whole = new RegExp(`^(?:${pattern})$`);
  function checked(value, Refusal) {
    if (value.length > 255 || !whole.test(value)) {
      throw new Refusal(`${quoted(value)} does not match ${pattern}`, "encoding.text");
    }
    return value;
  }
  return {
    write: (value) => concat([value.length], Array.from(checked(value, ConfigError), (sign) => sign.charCodeAt(0))),
    read: (source) => checked(String.fromCharCode(...source.take(source.take(1)[0])), ProtocolError),
  };
}

/** A finite IEEE 754 double, big-endian; zero has one encoding. */
export const real = {
  write(value) {
    if (!Number.isFinite(value)) throw new ConfigError(`${value} is not a finite number`, "encoding.real");
    const bytes = new Uint8Array(8);
    view(bytes).setFloat64(0, value + 0);
    return bytes;
  },
  read(source) {
    const value = view(source.take(8)).getFloat64(0);
    if (Number.isFinite(value) && !Object.is(value, -0)) return value;
    throw new ProtocolError("a real number is not finite, or is a negative zero", "encoding.real");
  },
};

export function choice(...names) {
  const inner = text("[a-z-]+");
  return {
    write: inner.write,
    read(source) {
      const name = inner.read(source);
      if (!names.includes(name)) throw new ProtocolError(`${quoted(name)} is not one of ${names}`, "encoding.choice");
      return name;
    },
  };
}

/** A value that may be null: a flag in 1 byte, then the value if there is one. */
export function optional(item) {
  return {
    write: (value) => (value === null ? Uint8Array.of(0) : concat([1], item.write(value))),
    read(source) {
      const [flag] = source.take(1);
      if (flag > 1) throw new ProtocolError(`flag ${flag} is neither 0 nor 1`, "encoding.flag");
      return flag ? item.read(source) : null;
    },
  };
}

/** A last field of a message that earlier versions did not have: null if no bytes are left. */
export const last = (item) => ({
  write: (value) => (value === null ? new Uint8Array() : item.write(value)),
  read: (source) => (source.left ? item.read(source) : null),
});

/** At most `limit` items in the given order, after their count in 4 bytes. */
export const sequence = (item, limit) => ({
  write: (values) => concat(count(values.length, limit), ...values.map(item.write)),
  read: (source) => Array.from({ length: readCount(source, limit) }, () => item.read(source)),
});

/** A Map of at most `limit` entries, written in strictly ascending order of key: no repeated key, one order. */
export function mapping(key, value, limit) {
  const entry = {
    write: ([name, found]) => concat(key.write(name), value.write(found)),
    read: (source) => [key.read(source), value.read(source)],
  };
  const entries = sequence(entry, limit);
  return {
    write: (values) => entries.write([...values].sort(([a], [b]) => (a < b ? -1 : 1))),
    read(source) {
      const pairs = entries.read(source);
      if (!ascending(pairs.map(([name]) => name))) {
        throw new ProtocolError("entries are repeated or out of order", "encoding.order");
      }
      return new Map(pairs);
    },
  };
}

/** An object with these fields in this order. What `check` refuses with a ConfigError is refused on reading. */
export function record(fields, check = () => {}) {
  const codecs = Object.entries(fields);
  return {
    write: (value) => concat(...codecs.map(([name, codec]) => codec.write(value[name]))),
    read(source) {
      const value = Object.freeze(Object.fromEntries(codecs.map(([name, codec]) => [name, codec.read(source)])));
      try {
        check(value);
      } catch (error) {
        throw error instanceof ConfigError ? ProtocolError.of(error) : error;
      }
      return value;
    },
  };
}

/** Whether texts are in strictly ascending order: none is repeated. */
export const ascending = (names) => names.every((name, i) => i === 0 || names[i - 1] < name);

function count(size, limit) {
  if (size > limit) throw new ConfigError(`${size} are over the limit of ${limit}`, "encoding.limit");
  return u32(size);
}

function readCount(source, limit) {
  const announced = view(source.take(4)).getUint32(0);
  if (announced > limit) throw new ProtocolError(`length ${announced} is over the limit of ${limit}`, "encoding.limit");
  if (announced > source.left) {
    // Every item takes a byte or more: refused before a list is built.
    throw new ProtocolError(`message is truncated: ${announced} items announced, ${source.left} bytes left`, "encoding.length");
  }
  return announced;
}
