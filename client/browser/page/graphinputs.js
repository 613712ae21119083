// The tensors of an adapter as inputs of an exported graph, and the slots that they fill: as edgeadapt/formats/graphinputs.py. A tensor
// here is { shape, values: Float32Array }, row-major, by graph input.

import { byCodePoint, encode, sha256 } from "./bytes.js";
import { DataError, quoted } from "./errors.js";

export const PEFT_PREFIX = "base_model.model.";
export const LORA_A = ".lora_A.weight";
export const LORA_B = ".lora_B.weight";
export const OUTPUT_SCALE = ".output_scale";
export const SCALES = [OUTPUT_SCALE, ".input_scale"];
export const OFFSET = ".output_offset";
export const REPLACED = ".replaced";
const VECTORS = [...SCALES, OFFSET, REPLACED];
/** The method of bottleneck adapters and the part of one that a graph input takes: [name, method, part], or null. */
export const bottleneckOf = (name) => name.match(/\.(bottleneck(?:_relu|_gelu)?)_((?:down|up)(?:_bias)?)$/);
const PARTS = ["down", "down_bias", "up", "up_bias"];

/** How graph inputs of a PEFT config's method end, if it is one of bottleneck adapters; else null. */
export function bottleneckEndings({ peft_type: type }) {
  const endings = PARTS.map((part) => `.${type.toLowerCase()}_${part}`);
  return bottleneckOf(endings[0]) && endings;
}

/** Whether a graph input has a column, or a row, for each rank. */
export const hasColumns = (name) => name.endsWith(LORA_A) || /^down/.test(bottleneckOf(name)?.[2]);
export const hasRows = (name) => name.endsWith(LORA_B) || bottleneckOf(name)?.[2] === "up";

const GIVEN = "given_"; // prefix of the dimension of a vector: 1, or 0 for an adapter that lacks it

// Graph inputs with a row for each virtual token: embeddings, or keys and values of every layer.
export const VIRTUAL = ["prompt_embeddings", "prefix_key_values"];

export const isVirtual = (name) => VIRTUAL.includes(name);

/** The virtual tokens that an adapter, as graph inputs, puts before a text. */
export const virtualTokens = (feeds) => VIRTUAL.reduce((sum, name) => sum + (feeds[name]?.dims[0] ?? 0), 0);

/** The kind of vector that a graph input takes, a scale, an offset or a replaced parameter; undefined for any other. */
export const vectorKind = (name) => VECTORS.find((kind) => name.endsWith(kind)) ?? name.match(/\.bottleneck\w*_up_bias$/)?.[0];

export const isHead = (name) => !isLora(name) && !bottleneckOf(name) && !vectorKind(name) && !isVirtual(name);

/** Refuse tensors that do not fill exactly the slots of a graph; return the size that each free dimension takes. Throws DataError: a
 * tensor is missing or unknown, of a shape that the graph does not take, or a vector that is there more than once. */
export function checkSlots(inputs, slots) {
  const odd = [...inputs.keys()].filter((name) => !Object.hasOwn(slots, name));
  odd.push(...Object.keys(slots).filter((name) => !inputs.has(name)));
  if (odd.length) {
    const first = odd.sort(byCodePoint)[0];
    throw new DataError(`tensor ${quoted(first)} is missing from the adapter or has no slot in the base's graph`, first);
  }
  const sizes = new Map();
  for (const [name, dimensions] of Object.entries(slots)) {
    const { shape } = inputs.get(name);
    const fits = dimensions.every((text, i) => shape[i] === sizeOf(text, shape[i], sizes));
    const repeated = dimensions[0].startsWith(GIVEN) && shape[0] > 1;
    if (shape.length !== dimensions.length || !fits || repeated) {
      const found = `is [${shape.join(", ")}], its slot takes [${dimensions.join(", ")}]`;
      throw new DataError(`tensor ${quoted(name)} ${found}`, name);
    }
  }
  return sizes;
}

function sizeOf(text, size, sizes) {
  if (/^[0-9]+$/.test(text)) return Number(text);
  if (!sizes.has(text)) sizes.set(text, size);
  return sizes.get(text);
}

/** The tensors of an adapter under peft's names by graph input. LoRA's matrices are transposed; B is not scaled. */
export function fromPeft(tensors) {
  const odd = [...tensors.keys()].find((name) => !name.startsWith(PEFT_PREFIX));
  if (odd !== undefined) throw new DataError(`tensor ${quoted(odd)} has not a name that peft gives`, odd);
  const own = [...tensors].map(([name, tensor]) => [name.slice(PEFT_PREFIX.length), tensor]);
  return new Map(own.map(([name, tensor]) => [name, toPeft(name, tensor)]));
}

/** A tensor as peft has it, from that of a graph input, or the other way round. */
export const toPeft = (name, tensor) => (isLora(name) && tensor.shape.length === 2 ? turned(tensor) : tensor);

/** The transposed matrix. */
export function turned({ shape, values }) {
  const [rows, columns] = shape;
  return { shape: [columns, rows], values: Float32Array.from(values, (_, i) => values[(i % rows) * columns + Math.floor(i / rows)]) };
}

export const product = (shape) => shape.reduce((size, each) => size * each, 1);

/** SHA-256 of names and shapes as peft has them, in order (edgeadapt/formats/layout.py). */
export async function layoutDigest(inputs) {
  const rows = [...inputs].map(([name, { shape }]) => [PEFT_PREFIX + name, isLora(name) ? [...shape].reverse() : shape]);
  rows.sort(([left], [right]) => byCodePoint(left, right));
  return sha256(encode(JSON.stringify(rows)));
}

const isLora = (name) => name.endsWith(LORA_A) || name.endsWith(LORA_B);
