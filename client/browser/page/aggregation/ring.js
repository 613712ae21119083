// The ring of integers mod 2^bits, up to 32 bits, as aggregation/ring.py: in memory wrapping, on the wire `bits` bits each.

import { DataError } from "../errors.js";

/** The type of array that holds elements of a ring of up to 32 bits. */
export const arrayType = (bits) => (bits <= 16 ? Uint16Array : Uint32Array);

/** Returns if `values` is a vector of `size` elements of this ring; else throws DataError. */
export function requireVector(values, size, bits) {
  if (values instanceof arrayType(bits) && values.length === size) return;
  throw new DataError(`a ring vector of ${size} elements of ${bits} bits is needed`, "ring.vector");
}

/** The low `bits` bits of each element; the first element is in the lowest bits of the first byte. */
export function pack(values, bits) {
  if (bits === 8 * values.BYTES_PER_ELEMENT) return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  const bytes = new Uint8Array(Math.ceil((values.length * bits) / 8));
  let [held, left, at] = [0, 0, 0]; // bits that wait for a byte: fewer than 8, so that 8 + 32 of them are exact
  for (const value of values) {
    held += (value % 2 ** bits) * 2 ** left;
    for (left += bits; left >= 8; left -= 8) {
      bytes[at++] = held % 256;
      held = Math.floor(held / 256);
    }
  }
  if (left) bytes[at] = held;
  return bytes;
}
