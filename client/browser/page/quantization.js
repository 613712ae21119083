// How an adapter file stores numbers: the reading half of edgeadapt/formats/quantization.py.

import { DataError, quoted } from "./errors.js";
import { hasColumns, isVirtual, turned, vectorKind } from "./graphinputs.js";
import * as numbers from "./numbers.js";
import { product } from "./numbers.js";

const SCALE = "#scale";
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
  if (type === "float32") return { shape, values: numbers.float32(tensor) };
  if (type === "float16") return { shape, values: numbers.float16(tensor) };
  return type === "int8" ? eightBits(name, tensor, stored) : fourBits(name, tensor, stored);
}

/** A scale for each rank of A and B, and for each row of any other tensor. */
function eightBits(name, tensor, stored) {
  const { shape } = tensor;
  const axis = hasColumns(name) ? 1 : 0;
  const expected = shape.map((size, i) => (i === axis ? size : 1));
  const scales = checkedScales(name, stored, { type: "float32", shape: expected, sound: (scale) => scale > 0 });
  return { shape, values: numbers.int8(tensor, scales, { size: shape[axis], inner: product(shape.slice(axis + 1)) }) };
}

/** A scale for each block of a row; A lies transposed, so that the numbers of one rank follow each other. */
function fourBits(name, tensor, stored) {
  const shape = [...tensor.shape.slice(0, -1), 2 * tensor.shape.at(-1)];
  const expected = [...shape.slice(0, -1), Math.ceil(shape.at(-1) / numbers.BLOCK)];
  const scales = checkedScales(name, stored, { type: "float16", shape: expected, sound: Number.isFinite });
  const values = numbers.int4(tensor, scales);
  if (!hasColumns(name)) return { shape, values };
  if (shape.length !== 2) throw new DataError(`tensor ${quoted(name)} is not a matrix`, name);
  return turned({ shape, values });
}

function checkedScales(name, stored, { type, shape, sound }) {
  const scale = stored.get(name + SCALE);
  const values = scale?.type === type && String(scale.shape) === String(shape) ? numbers[type](scale) : null;
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
