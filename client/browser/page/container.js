// The container of an adapter file, `.onnx_adapter`: names, number types, shapes and raw bytes of its tensors.
//
// It is a FlatBuffer of the schema in docs/reference/bundle-format.md.
// Every offset is checked before it is followed, since a FlatBuffer reader trusts them all. What the numbers mean is
// decided in ondevice.js.

import { byCodePoint, decode, encode } from "./bytes.js";
import { DataError } from "./errors.js";

const IDENTIFIER = 0x54524f54; // "TORT", little-endian
const FORMAT = 1;
const ADAPTER = { formatVersion: 0, parameters: 3 }; // the fields' places in the schema
const PARAMETER = { name: 0, dims: 1, dataType: 2, rawData: 3 };
const FLOAT32 = 1;
const TYPES = { 1: ["float32", 4], 2: ["uint8", 1], 3: ["int8", 1], 10: ["float16", 2] }; // name, bytes of an element
const MAX_PARAMETERS = 2 ** 16;
const MAX_DIMENSIONS = 8;

/**
 * The tensors of a file: Map of name → { type, shape, bytes }. `bytes` is a copy, so that it is aligned.
 *
 * Throws DataError: not such a file, of another version, or with an offset, a size or a name that cannot be.
 */
export function parse(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  if (file.length < 8 || view.getUint32(4, true) !== IDENTIFIER) throw damaged("it does not begin like one");
  const root = table(view, follow(view, 0));
  if (root.scalar(ADAPTER.formatVersion) !== FORMAT) throw damaged("it is of another version of the format");
  const places = vector(view, root.reference(ADAPTER.parameters), 4, MAX_PARAMETERS);
  const found = new Map();
  let left = file.length;
  for (let i = 0; i < places.length; i++) {
    const [name, tensor] = parameter(view, file, table(view, follow(view, places.start + 4 * i)));
    if (found.has(name)) throw damaged("it names a tensor twice");
    left -= tensor.bytes.length;
    if (left < 0) throw damaged("two tensors share their bytes");
    found.set(name, tensor);
  }
  return found;
}

function parameter(view, file, fields) {
  const label = vector(view, fields.reference(PARAMETER.name), 1, 2 ** 12);
  const dims = vector(view, fields.reference(PARAMETER.dims), 8, MAX_DIMENSIONS);
  const data = vector(view, fields.reference(PARAMETER.rawData), 1, file.length);
  const [type, width] = TYPES[fields.scalar(PARAMETER.dataType)] ?? [];
  if (!type) throw damaged("it holds numbers of a type that no adapter has");
  const shape = Array.from({ length: dims.length }, (_, i) => dimension(view, dims.start + 8 * i));
  if (shape.reduce((size, each) => size * each, width) !== data.length) throw damaged("a tensor is not of its size");
  return [name(file, label), { type, shape, bytes: file.slice(data.start, data.start + data.length) }];
}

function name(file, { start, length }) {
  try {
    return decode(file.subarray(start, start + length));
  } catch {
    throw damaged("a name is not text");
  }
}

function dimension(view, at) {
  const size = view.getBigInt64(at, true);
  if (size < 0n || size > 2n ** 31n) throw damaged("a dimension cannot be");
  return Number(size);
}

/** The table at `start`: its vtable gives each field's distance from it, 0 for one that is absent. */
function table(view, start) {
  const vtable = start - int32(view, start);
  within(view, vtable, 4);
  const [size, extent] = [view.getUint16(vtable, true), view.getUint16(vtable + 2, true)];
  if (size < 4 || size % 2 || extent < 4) throw damaged("a table is not sound");
  within(view, vtable, size);
  within(view, start, extent);
  const place = (field) => {
    const distance = 6 + 2 * field <= size ? view.getUint16(vtable + 4 + 2 * field, true) : 0;
    if (distance && (distance < 4 || distance + 4 > extent)) throw damaged("a field lies outside its table");
    return distance && start + distance;
  };
  return {
    scalar: (field) => (place(field) ? int32(view, place(field)) : 0),
    reference: (field) => (place(field) ? follow(view, place(field)) : 0),
  };
}

/** Where the vector at `at` begins, and how many elements of `width` bytes it has; an absent one is empty. */
function vector(view, at, width, most) {
  if (!at) return { start: 0, length: 0 };
  within(view, at, 4);
  const length = view.getUint32(at, true);
  if (length > most) throw damaged("a list is too long");
  within(view, at + 4, length * width);
  return { start: at + 4, length };
}

function follow(view, at) {
  within(view, at, 4);
  return at + view.getUint32(at, true);
}

function int32(view, at) {
  within(view, at, 4);
  return view.getInt32(at, true);
}

function within(view, start, size) {
  if (start < 0 || start + size > view.byteLength) throw damaged("an offset points outside of it");
}

/**
 * The file of float32 tensors, Map of name → { shape, values }. Law: `parse(pack(inputs))` has these tensors.
 *
 * Numbers of eight bytes and the values of a tensor begin at a multiple of eight, as ONNX Runtime's verifier demands.
 */
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

const damaged = (why) => new DataError(`not a sound .onnx_adapter file: ${why}`, ".onnx_adapter");
