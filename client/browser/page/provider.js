// Chooses where a graph runs: on WebGPU, if that gives the numbers of WebAssembly and gives them sooner; else in WebAssembly.

import { ConfigError } from "./errors.js";
import { threads } from "./runtime.js";

const TOLERANCE = 1e-3; // of the largest number of an array
const RUNS = 3; // of a probe by the clock, of which the fastest counts

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
  const shown = `WebAssembly, ${threads()} thread${threads() > 1 ? "s" : ""}`;
  const inWasm = (why) => ({ opened: native, gpu: false, runsOn: why ? `${shown} (${why})` : shown });
  if (provider === "wasm") return inWasm("");
  let found;
  try {
    found = await onGpu(open, native, provider !== undefined);
  } catch (error) {
    const why = String(error?.message ?? error).split("\n")[0]; // of any class: it may come from a driver
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
