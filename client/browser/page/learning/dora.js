// DoRA (Liu et al. 2024) as slots, as edgeadapt/methods/peft/dora.py: with d = m / ‖W + s B A‖, a layer computes (x W + b) d + x A (s d B)
// + b (1 - d). Values are Maps of name → Float32Array, as slotgraph.js has them: B is [rank, outputs], without s. An adapter that is
// trained has the magnitudes m of a layer; in its slots it has the scales d, and for a layer with a bias b the offsets b (1 - d).

import { LORA_B, OFFSET, OUTPUT_SCALE } from "../graphinputs.js";

export const MAGNITUDE = ".lora_magnitude_vector";

const layersOf = (values, ending) => [...values.keys()].filter((name) => name.endsWith(ending)).map((name) => name.slice(0, -ending.length));

export const magnitudes = (values) => layersOf(values, MAGNITUDE);

/** Each number of B with that of its output: `change(b, x)`, where the outputs have the numbers `of`. */
const byOutput = (b, of, change) => b.map((each, at) => change(each, of[at % of.length]));

/** The values of slots, from those with magnitudes. `norms`: ‖W + s B A‖ of each layer; `biases`: of those that have one. */
export function withScales(values, norms, biases) {
  const found = new Map(values);
  for (const path of magnitudes(values)) {
    const norm = norms.get(path);
    const scale = values.get(path + MAGNITUDE).map((magnitude, i) => magnitude / norm[i]);
    found.delete(path + MAGNITUDE);
    found.set(path + LORA_B, byOutput(values.get(path + LORA_B), scale, (b, d) => b * d)).set(path + OUTPUT_SCALE, scale);
    if (biases.has(path)) found.set(path + OFFSET, biases.get(path).map((bias, i) => bias * (1 - scale[i])));
  }
  return found;
}

/** The inverse of `withScales`, up to rounding. `normsOf` resolves to the norms of these values at layers. Where a scale is 0, B is
 * lost; whatever it is, the output is 0. */
export async function withMagnitudes(values, normsOf) {
  const found = new Map(values);
  const layers = layersOf(values, OUTPUT_SCALE);
  for (const path of layers) {
    found.set(path + LORA_B, byOutput(values.get(path + LORA_B), values.get(path + OUTPUT_SCALE), (b, d) => b / (d || 1)));
    found.delete(path + OUTPUT_SCALE);
    found.delete(path + OFFSET);
  }
  const norms = await normsOf(found, layers);
  const magnitude = (path) => values.get(path + OUTPUT_SCALE).map((scale, i) => scale * norms.get(path)[i]);
  for (const path of layers) found.set(path + MAGNITUDE, magnitude(path));
  return found;
}

/** The gradients by values with magnitudes, from those by what `withScales` makes of them. The norm counts as a constant, as peft has it
 * (section 4.3 of the paper). */
export function gradientsOfMagnitudes(gradients, values, norms, biases) {
  const found = new Map(gradients);
  for (const path of magnitudes(values)) {
    const [b, byB, norm] = [values.get(path + LORA_B), gradients.get(path + LORA_B), norms.get(path)];
    const byScale = Float64Array.from(gradients.get(path + OUTPUT_SCALE));
    byB.forEach((gradient, at) => (byScale[at % norm.length] += gradient * b[at]));
    biases.get(path)?.forEach((bias, i) => (byScale[i] -= bias * gradients.get(path + OFFSET)[i]));
    found.delete(path + OUTPUT_SCALE);
    found.delete(path + OFFSET);
    const scale = values.get(path + MAGNITUDE).map((magnitude, i) => magnitude / norm[i]);
    found.set(path + LORA_B, byOutput(byB, scale, (gradient, d) => gradient * d));
    found.set(path + MAGNITUDE, Float32Array.from(byScale, (gradient, i) => gradient / norm[i]));
  }
  return found;
}

/** Tensors of slots, { shape, values }, named as values: the scales of these layers as magnitudes, without offsets. */
export function asValues(inputs, layers) {
  const found = new Map(inputs);
  for (const path of layers) {
    const scale = inputs.get(path + OUTPUT_SCALE);
    if (scale?.values.length) found.set(path + MAGNITUDE, { ...scale, shape: [scale.values.length] });
    found.delete(path + OUTPUT_SCALE);
    found.delete(path + OFFSET);
  }
  return found;
}

/** Tensors as values, named and shaped as the slots that they fill, without offsets. */
export const asSlots = (inputs) =>
  new Map([...inputs].map(([name, tensor]) => (name.endsWith(MAGNITUDE) ? asScale(name, tensor) : [name, tensor])));

const asScale = (name, { shape, values }) => [name.replace(MAGNITUDE, OUTPUT_SCALE), { shape: [1, ...shape], values }];
