// Runs the frozen base in onnxruntime-web. One graph serves all adapters: an adapter is a set of inputs.

import { DataError } from "./errors.js";
import { MODEL, TRAINING, WEIGHTS } from "./trust.js";
import * as ort from "./vendor/onnxruntime-web/ort.wasm.min.mjs";

// Relative to this file, so that the page works below any path. Threads need an isolated page (COOP and COEP headers).
ort.env.wasm.wasmPaths = new URL("./vendor/onnxruntime-web/", import.meta.url).href;
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;
ort.env.logLevel = "error";

/**
 * A session of a graph among the verified files of a base. `options` are onnxruntime-web's. Throws DataError if it cannot
 * load them.
 */
export async function open(files, graph = MODEL, options = {}) {
  const weights = files.get(WEIGHTS);
  try {
    return await ort.InferenceSession.create(files.get(graph), {
      executionProviders: ["wasm"],
      externalData: weights ? [{ path: WEIGHTS, data: weights }] : [],
      ...options,
    });
  } catch (error) {
    throw new DataError(`this page cannot load the base: ${firstLine(error)}`, graph);
  }
}

/** A session of the training graph. Folding constants would store each weight once more. */
export const openTraining = (files) =>
  open(files, TRAINING, { extra: { optimization: { disable_specified_optimizers: "ConstantFolding" } } });

/** The outputs of a session. Throws DataError if the graph does not run. */
export async function run(session, feeds) {
  try {
    return await session.run(feeds);
  } catch (error) {
    throw new DataError(`the base does not run: ${firstLine(error)}; export it again`, MODEL);
  }
}

/** The tensors of an adapter as graph inputs. */
export const adapterFeeds = (inputs) =>
  Object.fromEntries([...inputs].map(([name, { shape, values }]) => [name, floats(values, shape)]));

/** The inputs of the bare base: every slot with its symbolic dimensions 0. */
export function emptyAdapter(slots) {
  const shape = (dimensions) => dimensions.map((text) => (/^[0-9]+$/.test(text) ? Number(text) : 0));
  const empty = ([name, dimensions]) => [name, { shape: shape(dimensions), values: zeros(shape(dimensions)) }];
  return new Map(Object.entries(slots).map(empty));
}

const zeros = (shape) => new Float32Array(shape.reduce((size, each) => size * each, 1));

/** An int64 tensor, of shape [1, n] if no other is given. */
export const int64 = (numbers, shape = [1, numbers.length]) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), shape);

/** The tokens of several texts as graph inputs of shape [texts, longest], padded with 0. */
export function padded(tokens) {
  const longest = Math.max(...tokens.map(({ length }) => length));
  const rows = (of) => tokens.flatMap((ids) => Array.from({ length: longest }, (_, i) => (i < ids.length ? of(ids[i]) : 0)));
  const shape = [tokens.length, longest];
  return { input_ids: int64(rows((id) => id), shape), attention_mask: int64(rows(() => 1), shape) };
}

/** The first `length` tokens of keys or values of a cache, [1, heads, tokens, size]. */
export function beginning({ data, dims: [, heads, tokens, size] }, length) {
  const kept = new Float32Array(heads * length * size);
  for (let head = 0; head < heads; head++) {
    const start = head * tokens * size;
    kept.set(data.subarray(start, start + length * size), head * length * size);
  }
  return floats(kept, [1, heads, length, size]);
}

export const floats = (values, shape) => new ort.Tensor("float32", values, shape);

export const threads = () => ort.env.wasm.numThreads;

const firstLine = (error) => String(error?.message ?? error).split("\n")[0];
