// The container of an adapter file, `.onnx_adapter`: names, number types, shapes and raw bytes of its tensors. It is a FlatBuffer of the
// schema in docs/reference/bundle-format.md. Every offset is checked before it is followed, since a FlatBuffer reader trusts them all. What
// the numbers mean is decided in ondevice.js.

import { byCodePoint, decode, encode } from "./bytes.js";
import { DataError, translated } from "./errors.js";

const IDENTIFIER = 0x54524f54; // "TORT", little-endian
const FORMAT = 1;
const ADAPTER = { formatVersion: 0, parameters: 3 }; // the fields' places in the schema
const PARAMETER = { name: 0, dims: 1, dataType: 2, rawData: 3 };
const FLOAT32 = 1;
const TYPES = { 1: ["float32", 4], 2: ["uint8", 1], 3: ["int8", 1], 10: ["float16", 2] }; // name, bytes of an element
const [MAX_DIMENSIONS, MAX_DIMENSION] = [8, 2 ** 31];

/** The tensors of a file: Map of name → { type, shape, bytes }. `bytes` is a copy, so that it is aligned. Throws DataError: not such a
 * file, of another version, or with an offset, a size or a name that cannot be. */
export function parse(file) {
  const refusal = ({ message }) => new DataError(`not a sound .onnx_adapter file: ${message}`, ".onnx_adapter");
  return translated(() => tensors(file, new DataView(file.buffer, file.byteOffset, file.byteLength)), refusal);
}

function tensors(file, view) {
  if (view.getUint32(4, true) !== IDENTIFIER) throw new RangeError("it does not begin like one");
  const root = table(view, follow(view, 0));
  if (root.scalar(ADAPTER.formatVersion) !== FORMAT) throw new RangeError("it is of another version of the format");
  const found = new Map();
  let left = file.length;
  for (const at of elements(view, root.place(ADAPTER.parameters), 4)) {
    const [name, tensor] = parameter(view, file, table(view, follow(view, at)));
    if (found.has(name)) throw new RangeError("it names a tensor twice");
    left -= tensor.bytes.length;
    if (left < 0) throw new RangeError("two tensors share their bytes");
    found.set(name, tensor);
  }
  return found;
}

function parameter(view, file, fields) {
  const [type, width] = TYPES[fields.scalar(PARAMETER.dataType)] ?? [];
  const shape = Array.from(elements(view, fields.place(PARAMETER.dims), 8), (at) => Number(view.getBigInt64(at, true)));
  if (!type || shape.length > MAX_DIMENSIONS || !shape.every((size) => 0 <= size && size <= MAX_DIMENSION)) {
    throw new RangeError("a tensor has a type or shape that no adapter has");
  }
  const [name, bytes] = [PARAMETER.name, PARAMETER.rawData].map((field) => {
    const { start, end } = elements(view, fields.place(field), 1);
    return file.slice(start, end);
  });
  if (shape.reduce((size, each) => size * each, width) !== bytes.length) throw new RangeError("a tensor is not of its size");
  return [decode(name), { type, shape, bytes }];
}

/** The table at `start`: its vtable gives each field's distance from it, 0 for one that is absent. */
function table(view, start) {
  const vtable = start - view.getInt32(start, true);
  const size = view.getUint16(vtable, true);
  const place = (field) => {
    const distance = 6 + 2 * field <= size ? view.getUint16(vtable + 4 + 2 * field, true) : 0;
    return distance && start + distance;
  };
  return { place, scalar: (field) => (place(field) ? view.getInt32(place(field), true) : 0) };
}

/** The positions of the elements, `width` bytes each, of the vector to which the field at `reference` refers; none without it. */
function elements(view, reference, width) {
  const vector = reference && follow(view, reference);
  const [start, length] = reference ? [vector + 4, view.getUint32(vector, true)] : [0, 0];
  const end = start + length * width;
  if (end > view.byteLength) throw new RangeError("a list ends outside of it");
  return {
    start,
    end,
    *[Symbol.iterator]() {
      for (let at = start; at < end; at += width) yield at;
    },
  };
}

const follow = (view, at) => at + view.getUint32(at, true);

/** The file of float32 tensors, Map of name → { shape, values }. Law: `parse(pack(inputs))` has these tensors. Numbers of eight bytes
 * and the values of a tensor begin at a multiple of eight, as ONNX Runtime's verifier demands. */
export function pack(inputs) {
  const tensors = [...inputs].sort(([left], [right]) => byCodePoint(left, right)).map(([name, each]) => [encode(name), each]);
  const size = tensors.reduce((sum, [name, { shape, values }]) => sum + 64 + name.length + 8 * shape.length + values.byteLength, 64);
  const file = new Uint8Array(size + 4 * tensors.length);
  const view = new DataView(file.buffer);
  let end = 8;
  const reserve = (bytes, alignment = 4, before = 0) => {
    const at = Math.ceil((end + before) / alignment) * alignment - before;
    end = at + bytes;
    return at;
  };
  const refer = (at, target) => view.setUint32(at, target - at, true);
  /** A list of `length` elements; its number of elements is before the first. */
  const list = (length, width, alignment = 4) => {
    const at = reserve(4 + length * width, alignment, 4);
    view.setUint32(at, length, true);
    return at;
  };
  const vtable = () => {
    const at = reserve(12);
    [12, 20, 4, 8, 12, 16].forEach((value, i) => view.setUint16(at + 2 * i, value, true)); // both tables have four fields
    return at;
  };
  const table = (fields) => {
    const at = reserve(20);
    view.setInt32(at, at - fields, true);
    return at;
  };
  const fields = vtable();
  const root = table(fields);
  view.setUint32(0, root, true);
  view.setUint32(4, IDENTIFIER, true);
  [FORMAT, 1, 1].forEach((version, i) => view.setInt32(root + 4 + 4 * i, version, true)); // of format, adapter and model
  const places = list(tensors.length, 4);
  refer(root + 16, places);
  tensors.forEach(([name, { shape, values }], i) => {
    const at = table(fields);
    refer(places + 4 + 4 * i, at);
    const label = list(name.length + 1, 1); // and a zero byte, which does not count
    view.setUint32(label, name.length, true);
    file.set(name, label + 4);
    refer(at + 4, label);
    const dims = list(shape.length, 8, 8);
    shape.forEach((dimension, j) => view.setBigInt64(dims + 4 + 8 * j, BigInt(dimension), true));
    refer(at + 8, dims);
    view.setInt32(at + 12, FLOAT32, true);
    const data = list(values.byteLength, 1, 8);
    file.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), data + 4);
    refer(at + 16, data);
  });
  return file.slice(0, end);
}
