// Decodes the number formats of adapter files into float32. Files are little-endian, as all platforms with browsers are.

export const BLOCK = 32; // four-bit integers with one scale (edgeadapt/formats/int4.py)

export const product = (shape) => shape.reduce((size, each) => size * each, 1);

export const float32 = ({ bytes }) => new Float32Array(bytes.buffer);

export const float16 = ({ bytes }) => Float32Array.from(new Uint16Array(bytes.buffer), half);

/** Eight-bit integers, with one scale for each entry of the axis that has `size` entries of `inner` numbers. */
export const int8 = ({ bytes }, scales, { size, inner }) =>
  Float32Array.from(new Int8Array(bytes.buffer), (value, i) => value * scales[Math.floor(i / inner) % size]);

/** Four-bit integers, two in a byte, the first in its low half, with one scale for each block of a row. */
export function int4({ shape, bytes }, scales) {
  const width = 2 * shape.at(-1);
  const blocks = Math.ceil(width / BLOCK);
  return Float32Array.from({ length: 2 * bytes.length }, (_, i) => {
    const code = (i % 2 ? bytes[i >> 1] >> 4 : bytes[i >> 1] & 15) - 8;
    return code * scales[Math.floor(i / width) * blocks + Math.floor((i % width) / BLOCK)];
  });
}

export function transposed(values, [rows, columns]) {
  return Float32Array.from(values, (_, i) => values[(i % rows) * columns + Math.floor(i / rows)]);
}

/** An IEEE 754 half-precision number: one sign bit, five exponent bits, ten fraction bits. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const [exponent, fraction] = [(bits >> 10) & 0x1f, bits & 0x3ff];
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
