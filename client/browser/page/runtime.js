// The frozen base in onnxruntime-web, and what it is fed. One graph for every adapter: an adapter is a set of inputs.

import { ConfigError, DataError } from "./errors.js";
import { MODEL, WEIGHTS } from "./trust.js";
import * as ort from "./vendor/onnxruntime-web/ort.wasm.min.mjs";

// Relative to this file, so that the page works below any path; threads only where the page is isolated (COOP, COEP).
ort.env.wasm.wasmPaths = new URL("./vendor/onnxruntime-web/", import.meta.url).href;
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;
ort.env.logLevel = "error";

/** A session over the verified files of a base. Throws DataError if this version of the runtime cannot load them. */
export async function open(files) {
  const weights = files.get(WEIGHTS);
  try {
    return await ort.InferenceSession.create(files.get(MODEL), {
      executionProviders: ["wasm"],
      externalData: weights ? [{ path: WEIGHTS, data: weights }] : [],
    });
  } catch (error) {
    throw new DataError(`the base cannot be loaded by this page: ${firstLine(error)}`);
  }
}

export async function run(session, feeds) {
  try {
    return await session.run(feeds);
  } catch (error) {
    throw new ConfigError(`the model cannot be run here: ${firstLine(error)}`);
  }
}

/** An adapter's tensors as feeds. A slot that is declared for a batch, `[rows, …]`, gets one adapter for its one row. */
export function adapterFeeds(session, inputs) {
  const ranks = new Map(session.inputMetadata.map((input) => [input.name, input.shape.length]));
  const feeds = {};
  for (const [name, { shape, values }] of inputs) {
    const dims = ranks.get(name) === shape.length + 1 ? [1, ...shape] : shape;
    feeds[name] = new ort.Tensor("float32", values, dims);
  }
  return feeds;
}

/** The feeds of the bare base: every slot with its free dimensions 0. */
export function emptyAdapter(slots) {
  const shape = (dimensions) => dimensions.map((text) => (/^[0-9]+$/.test(text) ? Number(text) : 0));
  const empty = ([name, dimensions]) => [name, { shape: shape(dimensions), values: zeros(shape(dimensions)) }];
  return new Map(Object.entries(slots).map(empty));
}

const zeros = (shape) => new Float32Array(shape.reduce((size, each) => size * each, 1));

/** A row of int64 numbers, shape [1, n]. */
export const int64 = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);

export const floats = (values, shape) => new ort.Tensor("float32", values, shape);

export const threads = () => ort.env.wasm.numThreads;

const firstLine = (error) => String(error?.message ?? error).split("\n")[0];
