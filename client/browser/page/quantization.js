// How an adapter file stores numbers: the reading half of edgeadapt/formats/quantization.py. Files are little-endian, as all platforms with
// browsers are.

import { DataError, quoted } from "./errors.js";
import { hasColumns, isVirtual, product, turned, vectorKind } from "./graphinputs.js";

const SCALE = "#scale";
const BLOCK = 32; // four-bit integers with one scale (edgeadapt/formats/int4.py)
// The number types of matrices, by format.
const TYPES = { fp32: ["float32"], fp16: ["float16"], int8: ["int8"], int4: ["uint8", "int8"] };

/** The float32 tensors of what `container.parse` found, in the number format that the manifest states. Throws DataError: a tensor has
 * another number type than the format allows, a scale is missing, left over, of another shape or not sound, or a value is not finite. */
export function restore(stored, format) {
  const inputs = new Map();
  for (const [name, tensor] of stored) {
    if (name.endsWith(SCALE)) checkOwner(name, stored);
    else inputs.set(name, finite(name, restored(name, tensor, stored, format)));
  }
  return inputs;
}

function restored(name, tensor, stored, format) {
  const { type, shape } = tensor;
  const matrix = shape.length >= 2 && product(shape) && !vectorKind(name) && !isVirtual(name);
  const allowed = matrix ? TYPES[format] : ["float32"];
  if (!allowed.includes(type)) {
    throw new DataError(`tensor ${quoted(name)} is ${type} in an adapter of format ${format}`, name);
  }
  if (Object.hasOwn(FLOATS, type)) return { shape, values: FLOATS[type](tensor) };
  return type === "int8" ? eightBits(name, tensor, stored) : fourBits(name, tensor, stored);
}

/** A scale for each rank of A and B, and for each row of any other tensor. */
function eightBits(name, tensor, stored) {
  const { shape } = tensor;
  const axis = hasColumns(name) ? 1 : 0;
  const expected = shape.map((size, i) => (i === axis ? size : 1));
  const scales = checkedScales(name, stored, { type: "float32", shape: expected, sound: (scale) => scale > 0 });
  return { shape, values: int8(tensor, scales, { size: shape[axis], inner: product(shape.slice(axis + 1)) }) };
}

/** A scale for each block of a row; A lies transposed, so that the numbers of one rank follow each other. */
function fourBits(name, tensor, stored) {
  const shape = [...tensor.shape.slice(0, -1), 2 * tensor.shape.at(-1)];
  const expected = [...shape.slice(0, -1), Math.ceil(shape.at(-1) / BLOCK)];
  const scales = checkedScales(name, stored, { type: "float16", shape: expected, sound: Number.isFinite });
  const values = int4(tensor, scales);
  if (!hasColumns(name)) return { shape, values };
  if (shape.length !== 2) throw new DataError(`tensor ${quoted(name)} is not a matrix`, name);
  return turned({ shape, values });
}

function checkedScales(name, stored, { type, shape, sound }) {
  const scale = stored.get(name + SCALE);
  const values = scale?.type === type && String(scale.shape) === String(shape) ? FLOATS[type](scale) : null;
  if (!values?.every((value) => sound(value))) {
    throw new DataError(`tensor ${quoted(name)} has no sound scales of shape [${shape.join(", ")}]`, name);
  }
  return values;
}

function checkOwner(name, stored) {
  const owner = stored.get(name.slice(0, -SCALE.length));
  if (owner?.type !== "int8" && owner?.type !== "uint8") {
    throw new DataError(`scales ${quoted(name)} belong to no tensor of the adapter`, name);
  }
}

function finite(name, tensor) {
  if (!tensor.values.every(Number.isFinite)) throw new DataError(`tensor ${quoted(name)} holds NaN or infinity`, name);
  return tensor;
}

const FLOATS = {
  float32: ({ bytes }) => new Float32Array(bytes.buffer),
  float16: ({ bytes }) => Float32Array.from(new Uint16Array(bytes.buffer), half),
};

/** Eight-bit integers, with one scale for each entry of the axis that has `size` entries of `inner` numbers. */
const int8 = ({ bytes }, scales, { size, inner }) =>
  Float32Array.from(new Int8Array(bytes.buffer), (value, i) => value * scales[Math.floor(i / inner) % size]);

/** Four-bit integers, two in a byte, the first in its low half, with one scale for each block of a row. */
function int4({ shape, bytes }, scales) {
  const width = 2 * shape.at(-1);
  const blocks = Math.ceil(width / BLOCK);
  return Float32Array.from({ length: 2 * bytes.length }, (_, i) => {
    const code = (i % 2 ? bytes[i >> 1] >> 4 : bytes[i >> 1] & 15) - 8;
    return code * scales[Math.floor(i / width) * blocks + Math.floor((i % width) / BLOCK)];
  });
}

/** An IEEE 754 half-precision number: one sign bit, five exponent bits, ten fraction bits. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const [exponent, fraction] = [(bits >> 10) & 0x1f, bits & 0x3ff];
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
