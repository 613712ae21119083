// Runs the frozen base in onnxruntime-web. One graph serves all adapters: an adapter is a set of inputs.

import { DataError, translated } from "./errors.js";
import { hasColumns, hasRows, isVirtual, vectorKind } from "./graphinputs.js";
import { LOWER, MODEL, TRAINING, WEIGHTS } from "./trust.js";
import * as ort from "./vendor/onnxruntime-web/ort.wasm.min.mjs";

const onGpu = new WeakSet(); // sessions
const PROBE_SIZE = 2; // of a free dimension
export const STATES = "states"; // below all slots, which the training graph of a base reads whose last layers alone have slots

configured(ort);

/** A session of a graph among the verified files of a base, in WebAssembly or, with `gpu`, on WebGPU. The outputs of the names `kept`
 * stay in the memory of WebGPU. `options` are onnxruntime-web's. Throws DataError if it cannot load them. */
export function open(files, graph = MODEL, { gpu = false, kept = [], ...options } = {}) {
  const weights = files.get(WEIGHTS);
  return translated(async () => {
    // A library of its own: after a failure in WebGPU's, WebAssembly's still works. It needs promises in WebAssembly (JSPI).
    const library = gpu ? configured(await import("./vendor/onnxruntime-web/ort.jspi.min.mjs")) : ort;
    const session = await library.InferenceSession.create(files.get(graph), {
      executionProviders: gpu ? ["webgpu", "wasm"] : ["wasm"],
      externalData: weights ? [{ path: WEIGHTS, data: weights }] : [],
      ...(gpu ? { preferredOutputLocation: Object.fromEntries(kept.map((name) => [name, "gpu-buffer"])) } : {}),
      ...options,
    });
    if (gpu) onGpu.add(session);
    return session;
  }, (error) => new DataError(`this page cannot load the base: ${firstLine(error)}`, graph));
}

function configured(library) {
  const { env } = library;
  // Its WebAssembly is next to the library. Threads need an isolated page (COOP and COEP headers).
  env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;
  env.logLevel = "error";
  return library;
}

/** A session of the training graph. Folding constants would store each weight once more. It has `lower`, a session of the graph of the
 * states that it reads, if it reads such; both are released as one. */
export async function openTraining(files, gpu) {
  const training = await open(files, TRAINING, { gpu, extra: { optimization: { disable_specified_optimizers: "ConstantFolding" } } });
  if (!training.inputNames.includes(STATES)) return training;
  try {
    const lower = await open(files, LOWER);
    const release = training.release.bind(training);
    return Object.assign(training, { lower, release: () => Promise.all([lower.release(), release()]) });
  } catch (error) {
    await training.release();
    throw error;
  }
}

/** The outputs of a session, or those of the names `outputs`. Throws DataError if the graph does not run. */
export async function run(session, feeds, outputs = undefined) {
  const [given, remedy] = onGpu.has(session)
    ? [withoutRankZero(feeds), "open the page with ?provider=wasm"]
    : [feeds, "export it again"];
  const refusal = (error) => new DataError(`the base does not run: ${firstLine(error)}; ${remedy}`, MODEL);
  return translated(() => session.run(given, outputs), refusal);
}

/** Feeds without matrices of rank 0, which WebGPU cannot multiply: a product of rank 1 that is 0 takes their place. */
function withoutRankZero(feeds) {
  const isEmpty = ([name, { dims }]) => (hasColumns(name) || hasRows(name)) && dims.includes(0);
  const widened = ([name, { dims }]) => {
    const shape = dims.map((size) => size || 1);
    return [name, floats(zeros(shape), shape)];
  };
  return { ...feeds, ...Object.fromEntries(Object.entries(feeds).filter(isEmpty).map(widened)) };
}

export const adapterFeeds = (inputs) =>
  Object.fromEntries([...inputs].map(([name, { shape, values }]) => [name, floats(values, shape)]));

/** The inputs of the bare base: every slot with its symbolic dimensions 0. */
export function emptyAdapter(slots) {
  const shape = (dimensions) => dimensions.map((text) => (/^[0-9]+$/.test(text) ? Number(text) : 0));
  const empty = ([name, dimensions]) => [name, { shape: shape(dimensions), values: zeros(shape(dimensions)) }];
  return new Map(Object.entries(slots).map(empty));
}

/** Inputs of an adapter that fills every slot but those of virtual tokens, the same ones each time. */
export function probeAdapter(slots) {
  const sizeOf = (name, text) => (/^[0-9]+$/.test(text) ? Number(text) : isVirtual(name) ? 0 : vectorKind(name) ? 1 : PROBE_SIZE);
  const probe = ([name, dimensions]) => {
    const shape = dimensions.map((text) => sizeOf(name, text));
    const middle = vectorKind(name) ? 1 : 0;
    return [name, { shape, values: zeros(shape).map((_, i) => middle + Math.sin(i) / 10) }];
  };
  return new Map(Object.entries(slots).map(probe));
}

const zeros = (shape) => new Float32Array(shape.reduce((size, each) => size * each, 1));

/** Zeros for each input of a session, with a size of 1 where any will do. */
export const zeroFeeds = (session) =>
  Object.fromEntries(
    session.inputMetadata.map(({ name, type, shape }) => {
      const sizes = shape.map((size) => (typeof size === "number" ? size : 1));
      return [name, type === "int64" ? int64([...zeros(sizes)], sizes) : floats(zeros(sizes), sizes)];
    }),
  );

/** An int64 tensor, of shape [1, n] if no other is given. */
export const int64 = (numbers, shape = [1, numbers.length]) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), shape);

/** Free a tensor's memory in WebGPU, if it is there. */
export const release = (tensor) => tensor.location === "gpu-buffer" && tensor.dispose();

/** The tokens of several texts as graph inputs of shape [texts, longest], padded with 0. */
export function padded(tokens) {
  const longest = Math.max(...tokens.map(({ length }) => length));
  const rows = (of) => tokens.flatMap((ids) => Array.from({ length: longest }, (_, i) => (i < ids.length ? of(ids[i]) : 0)));
  const shape = [tokens.length, longest];
  return { input_ids: int64(rows((id) => id), shape), attention_mask: int64(rows(() => 1), shape) };
}

/** The first `length` tokens of keys or values of a cache, [1, heads, tokens, size]. */
export async function beginning(tensor, length) {
  const [, heads, tokens, size] = tensor.dims;
  const data = await tensor.getData(true);
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
