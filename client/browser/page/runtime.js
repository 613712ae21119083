// Runs the frozen base in onnxruntime-web: on WebGPU, if that gives the numbers of WebAssembly and gives them sooner; else in WebAssembly.
// One graph serves all adapters: an adapter is a set of inputs.

import { ConfigError, DataError, translated } from "./errors.js";
import { hasColumns, hasRows, isVirtual, product, vectorKind } from "./graphinputs.js";
import { LOWER, MODEL, TRAINING, WEIGHTS } from "./trust.js";
import * as ort from "./vendor/onnxruntime-web/ort.wasm.min.mjs";

const gpuSessions = new WeakSet();
const PROBE_SIZE = 2; // of a free dimension
const TOLERANCE = 1e-3; // of the largest number of an array
const RUNS = 3; // of a probe by the clock, of which the fastest counts
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
    if (gpu) gpuSessions.add(session);
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
  const [given, remedy] = gpuSessions.has(session)
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

/** The inputs of the bare base: every slot with its symbolic dimensions 0, or those of the size that `free` gives for a name. */
export function emptyAdapter(slots, free = () => 0) {
  const empty = ([name, dimensions]) => {
    const shape = dimensions.map((text) => (/^[0-9]+$/.test(text) ? Number(text) : free(name)));
    return [name, { shape, values: zeros(shape) }];
  };
  return new Map(Object.entries(slots).map(empty));
}

/** Inputs of an adapter that fills every slot but those of virtual tokens, the same ones each time. */
export function probeAdapter(slots) {
  const inputs = emptyAdapter(slots, (name) => (isVirtual(name) ? 0 : vectorKind(name) ? 1 : PROBE_SIZE));
  for (const [name, { values }] of inputs) values.forEach((_, i) => (values[i] = (vectorKind(name) ? 1 : 0) + Math.sin(i) / 10));
  return inputs;
}

const zeros = (shape) => new Float32Array(product(shape));

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

const firstLine = (error) => String(error?.message ?? error).split("\n")[0];

/** Fixed texts as tokens, which every vocabulary has; short and long ones take different ways through a graph. */
export const fixedTexts = ({ limit, least = 1 }) =>
  [16, 3, 100].map((length) => Array.from({ length: Math.max(least, Math.min(length, limit)) }, (_, i) => i % 8));

/** What `open` gives for the provider that is chosen, whether that is WebGPU, and where it runs in words: { opened, gpu, runsOn }.
 *
 * `open(gpu)` resolves to { session, probe, … }; `probe()` to arrays of numbers that both providers must agree on. `provider` is "wasm",
 * "webgpu", or undefined for a choice. What is not chosen is released.
 *
 * Throws ConfigError: WebGPU is asked for by name, and this browser has none that works; or another name. Or as `open(false)`. */
export async function choose(open, provider) {
  if (![undefined, "wasm", "webgpu"].includes(provider)) throw new ConfigError("the provider is wasm or webgpu", "provider");
  const native = await open(false);
  const { numThreads: threads } = ort.env.wasm;
  const shown = `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  const inWasm = (why) => ({ opened: native, gpu: false, runsOn: why ? `${shown} (${why})` : shown });
  if (provider === "wasm") return inWasm("");
  let found;
  try {
    found = await onGpu(open, native, provider !== undefined);
  } catch (error) {
    const why = firstLine(error); // of any class: it may come from a driver
    if (provider === undefined) return inWasm(why);
    await native.session.release();
    throw new ConfigError(`${why}: open the page without ?provider=webgpu`, "provider");
  }
  await native.session.release();
  return found;
}

async function onGpu(open, native, named) {
  const { vendor, architecture, isFallbackAdapter } = await gpu();
  if (isFallbackAdapter && !named) throw new ConfigError("WebGPU is emulated here", "provider");
  const expected = await timed(native.probe);
  const opened = await open(true);
  try {
    const found = await timed(opened.probe);
    if (!agree(found.numbers, expected.numbers)) throw new ConfigError("WebGPU gives other numbers", "provider");
    if (found.milliseconds > expected.milliseconds && !named) throw new ConfigError("WebGPU is slower", "provider");
    return { opened, gpu: true, runsOn: `WebGPU (${[vendor, architecture].filter(Boolean).join(" ") || "unnamed"})` };
  } catch (error) {
    await opened.session.release();
    throw error;
  }
}

/** What the browser says of its graphics processor. Throws ConfigError: it gives none, or has no promises in WebAssembly. */
async function gpu() {
  const adapter = "Suspending" in WebAssembly && (await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" }));
  if (!adapter) throw new ConfigError("no WebGPU", "provider");
  return adapter.info;
}

/** The numbers of a probe, and the milliseconds of its fastest run after the first, which compiles. */
async function timed(probe) {
  const numbers = await probe();
  const times = [];
  for (let run = 0; run < RUNS; run++) {
    const start = performance.now();
    await probe();
    times.push(performance.now() - start);
  }
  return { numbers, milliseconds: Math.min(...times) };
}

const agree = (found, expected) =>
  expected.every((numbers, row) => {
    const largest = numbers.reduce((most, number) => Math.max(most, Math.abs(number)), 0);
    return numbers.every((number, i) => Math.abs(found[row][i] - number) <= TOLERANCE * largest);
  });
