// Reads an adapter's safetensors file, in which a plan distributes it: as edgeadapt/formats/files.py. The length of the header in eight
// bytes, little-endian; the header, a JSON object of name → { dtype, shape, data_offsets }, with texts under "__metadata__"; then the
// numbers. Every size is checked before it is used.

import { DataError, quoted, translated } from "./errors.js";
import { isObject, parse as json } from "./dsse.js";
import { product } from "./graphinputs.js";

const MAX_FILE = 2 ** 30; // bytes
const MAX_HEADER = 2 ** 22; // bytes; an adapter of a thousand tensors has 150 kB
const MAX_DIMENSIONS = 8;
const LENGTH = 8; // bytes before the header
const METADATA = "__metadata__";
const STRINGS = /"(?:[^"\\]|\\.)*"/g;
const STRUCTURE = /^[\s{}[\]:,0-9]*$/; // what is left without texts: no fraction, no exponent, no sign

/** The tensors of a file: Map of name → { shape, values: Float32Array }, sorted by name as they are flattened. Throws DataError:
 * truncated, oversized or damaged; numbers of another type than float32; gaps or overlaps; no tensor at all; NaN or infinity. */
export function parse(file) {
  if (file.length > MAX_FILE) throw damaged(`it has ${file.length} bytes, above the limit of ${MAX_FILE}`);
  const start = LENGTH + headerSize(file);
  const data = file.subarray(start);
  const found = new Map();
  let end = 0;
  for (const [name, { shape, data_offsets: offsets }] of entries(file.subarray(LENGTH, start))) {
    if (offsets[0] !== end) throw damaged(`tensor ${quoted(name)} does not begin where the one before it ends`);
    end += Float32Array.BYTES_PER_ELEMENT * product(shape);
    if (offsets[1] !== end || end > data.length) throw damaged(`tensor ${quoted(name)} is not of its size`);
    const values = new Float32Array(data.slice(offsets[0], end).buffer); // a copy, so that it is aligned
    if (!values.every(Number.isFinite)) throw new DataError(`tensor ${quoted(name)} holds NaN or infinity`, name);
    found.set(name, { shape, values });
  }
  if (!found.size) throw damaged("it has no tensors");
  if (end !== data.length) throw damaged(`${data.length - end} bytes are left over`);
  return new Map([...found].sort(([left], [right]) => (left < right ? -1 : 1))); // names are ASCII
}

function headerSize(file) {
  if (file.length < LENGTH) throw damaged("it is truncated");
  const size = new DataView(file.buffer, file.byteOffset).getBigUint64(0, true);
  if (size > MAX_HEADER) throw damaged(`its header of ${size} bytes is above the limit of ${MAX_HEADER}`);
  if (Number(size) > file.length - LENGTH) throw damaged("it is truncated");
  return Number(size);
}

/** The tensors that a header describes, [name, description], in the order of their places. */
function entries(raw) {
  const refusal = () => damaged("its header is not a JSON object of texts and whole numbers");
  const header = translated(() => json(raw), refusal);
  if (!isObject(header) || !STRUCTURE.test(new TextDecoder().decode(raw).replace(STRINGS, ""))) throw refusal();
  const { [METADATA]: metadata = {}, ...tensors } = header;
  if (!isObject(metadata) || !Object.values(metadata).every((value) => typeof value === "string")) {
    throw damaged("its metadata are not texts");
  }
  for (const [name, tensor] of Object.entries(tensors)) checkDescription(name, tensor);
  return Object.entries(tensors).sort(([, left], [, right]) => compare(left.data_offsets, right.data_offsets));
}

function checkDescription(name, tensor) {
  if (!/^[\x20-\x7e]+$/.test(name)) throw damaged("a name is not printable ASCII");
  if (!isObject(tensor) || String(Object.keys(tensor).sort()) !== "data_offsets,dtype,shape") {
    throw damaged(`tensor ${quoted(name)} is not described by dtype, shape and data_offsets`);
  }
  const { dtype, shape, data_offsets: offsets } = tensor;
  if (dtype !== "F32") throw new DataError(`tensor ${quoted(name)} is of type ${quoted(dtype, 20)}, not F32`, name);
  const whole = (list) => Array.isArray(list) && list.every((each) => Number.isInteger(each) && each <= MAX_FILE);
  if (!whole(shape) || shape.length > MAX_DIMENSIONS || !whole(offsets) || offsets.length !== 2) {
    throw damaged(`tensor ${quoted(name)} has a shape or a place that cannot be`);
  }
}

const compare = (left, right) => left[0] - right[0] || left[1] - right[1];

const damaged = (why) => new DataError(`not a sound adapter file: ${why}`, "adapter");
