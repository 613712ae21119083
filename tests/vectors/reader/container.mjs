// Adapter files (docs/reference/bundle-format.md, "Adapter file"): the FlatBuffer, and its numbers as float32.

import { Refused, require } from "./refused.mjs";

const MAX_DIMENSIONS = 8;
const MAX_DIMENSION = 2 ** 31;
const WIDTHS = new Map([[1, 4], [2, 1], [3, 1], [10, 2]]); // data_type → bytes of an element
const [FLOAT32, UINT8, INT8, FLOAT16] = WIDTHS.keys();
const TYPES = { fp32: [FLOAT32], fp16: [FLOAT16], int8: [INT8], int4: [UINT8, INT8] };
const BLOCK = 32; // numbers of a row that share a scale, in int4
const SCALE = "#scale";
const isVector = (name) => /\.(output_scale|input_scale|output_offset|replaced|bottleneck(_relu|_gelu)?_up_bias)$/.test(name);
const isVirtual = (name) => name === "prompt_embeddings" || name === "prefix_key_values";
const byColumn = (name) => isA(name) || /\.bottleneck(_relu|_gelu)?_down(_bias)?$/.test(name);
export const isA = (name) => name.endsWith(".lora_A.weight");
export const isB = (name) => name.endsWith(".lora_B.weight");
const size = (shape) => shape.reduce((product, each) => product * each, 1);
const rowsOf = (values, width) => Array.from({ length: values.length / width }, (_, i) => values.subarray(i * width, (i + 1) * width));

/** The tensors of a file: Map of name → { type, shape, bytes }. */
export function parse(file) {
  try {
    return read(new DataView(file.buffer, file.byteOffset, file.byteLength), file);
  } catch (error) {
    if (error instanceof RangeError || error instanceof TypeError) throw new Refused("container", error.message);
    throw error;
  }
}

function read(view, file) {
  require(file.toString("latin1", 4, 8) === "TORT", "container", "not an adapter file");
  const root = table(view, view.getUint32(0, true));
  require(root.number(0) === 1, "container", "another version of the format");
  const [start, count] = vector(view, root.reference(3), 4);
  const found = new Map();
  for (let i = 0; i < count; i++) {
    const at = start + 4 * i;
    const parameter = table(view, at + view.getUint32(at, true));
    const name = text(file, vector(view, parameter.reference(0), 1));
    require(!found.has(name), "container", "a name occurs twice");
    found.set(name, tensor(view, file, parameter));
  }
  const total = [...found.values()].reduce((sum, { bytes }) => sum + bytes.length, 0);
  require(total <= file.length, "container", "two tensors share their bytes");
  return found;
}

function tensor(view, file, parameter) {
  const [first, rank] = vector(view, parameter.reference(1), 8);
  require(rank <= MAX_DIMENSIONS, "container", "too many dimensions");
  const shape = Array.from({ length: rank }, (_, i) => Number(view.getBigInt64(first + 8 * i, true)));
  const type = parameter.number(2);
  const [start, length] = vector(view, parameter.reference(3), 1);
  const sound = WIDTHS.has(type) && shape.every((each) => each >= 0 && each <= MAX_DIMENSION) && size(shape) * WIDTHS.get(type) === length;
  require(sound, "container", "a tensor is not of its size");
  return { type, shape, bytes: file.subarray(start, start + length) };
}

/** The fields of the table at `position`: a number, or the position that a reference leads to; 0 for an absent one. */
function table(view, position) {
  const vtable = position - view.getInt32(position, true);
  const extent = view.getUint16(vtable, true);
  const place = (field) => {
    const entry = 4 + 2 * field;
    const distance = entry + 2 <= extent ? view.getUint16(vtable + entry, true) : 0;
    return distance && position + distance;
  };
  return {
    number: (field) => (place(field) ? view.getInt32(place(field), true) : 0),
    reference: (field) => (place(field) ? place(field) + view.getUint32(place(field), true) : 0),
  };
}

/** Where the elements of a vector begin, and how many of `width` bytes there are. */
function vector(view, position, width) {
  if (!position) return [0, 0];
  const count = view.getUint32(position, true);
  require(position + 4 + count * width <= view.byteLength, "container", "a vector ends outside of the file");
  return [position + 4, count];
}

function text(file, [start, length]) {
  return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(file.subarray(start, start + length));
}

/** The float32 tensors of what `parse` found: Map of name → { shape, values }. */
export function restore(stored, format) {
  const found = new Map();
  for (const [name, value] of stored) {
    if (name.endsWith(SCALE)) {
      const owner = stored.get(name.slice(0, -SCALE.length));
      require(owner?.type === INT8 || owner?.type === UINT8, "numbers", `${name} belongs to no tensor`);
      continue;
    }
    const allowed = value.shape.length < 2 || !size(value.shape) || isVector(name) || isVirtual(name) ? [FLOAT32] : TYPES[format];
    require(allowed.includes(value.type), "numbers", `${name} is of a type that ${format} does not have`);
    const tensor = float32(name, value, stored);
    require(tensor.values.every(Number.isFinite), "numbers", `${name} is not finite`);
    found.set(name, tensor);
  }
  return found;
}

function float32(name, value, stored) {
  if (value.type === INT8) return eightBits(name, value, stored.get(name + SCALE));
  if (value.type === UINT8) return fourBits(name, value, stored.get(name + SCALE));
  return { shape: value.shape, values: floats(value) };
}

function floats({ type, shape, bytes }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const at = type === FLOAT32 ? (i) => view.getFloat32(4 * i, true) : (i) => binary16(view.getUint16(2 * i, true));
  return Float32Array.from({ length: size(shape) }, (_, i) => at(i));
}

/** IEEE 754 binary16: one sign bit, five exponent bits, ten fraction bits. */
function binary16(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * (1024 + fraction) * 2 ** (exponent - 25) : sign * fraction * 2 ** -24;
}

function eightBits(name, { shape, bytes }, scale) {
  const grouped = byColumn(name) ? 1 : 0; // the axis whose entries have a scale each
  const expected = shape.map((each, axis) => (axis === grouped ? each : 1));
  const scales = scalesOf(name, scale, FLOAT32, expected, (each) => each > 0);
  const inner = size(shape.slice(grouped + 1));
  const code = (i) => (bytes[i] << 24) >> 24;
  const values = Float32Array.from(bytes, (_, i) => code(i) * scales[Math.floor(i / inner) % shape[grouped]]);
  return { shape, values };
}

function fourBits(name, { shape, bytes }, scale) {
  const [before, half] = [shape.slice(0, -1), shape.at(-1)];
  const [width, blocks] = [2 * half, Math.ceil((2 * half) / BLOCK)];
  const scales = rowsOf(scalesOf(name, scale, FLOAT16, [...before, blocks], Number.isFinite), blocks);
  const values = new Float32Array(2 * bytes.length);
  rowsOf(bytes, half).forEach((row, r) => {
    for (let j = 0; j < width; j++) {
      const nibble = j % 2 ? row[j >> 1] >> 4 : row[j >> 1] & 15;
      values[r * width + j] = (nibble - 8) * scales[r][Math.floor(j / BLOCK)];
    }
  });
  const whole = [...before, width];
  return byColumn(name) ? transposed(values, whole) : { shape: whole, values };
}

function transposed(values, shape) {
  require(shape.length === 2, "slots", "A has two dimensions");
  const [rows, columns] = shape;
  const result = Float32Array.from(values, (_, i) => values[(i % rows) * columns + Math.floor(i / rows)]);
  return { shape: [columns, rows], values: result };
}

function scalesOf(name, scale, type, shape, sound) {
  require(scale?.type === type && String(scale.shape) === String(shape), "numbers", `${name} lacks its scales`);
  const values = floats(scale);
  require(values.every(sound), "numbers", `a scale of ${name} is not sound`);
  return values;
}
