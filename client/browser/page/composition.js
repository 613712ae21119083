// Several adapters as one: how people write it, and its tensors, by the rules of client/inference/library.py.

import { ConfigError, quoted } from "./errors.js";
import { REPLACED, SCALES, VIRTUAL, hasColumns, hasRows, isVirtual, turned, vectorKind } from "./graphinputs.js";
import { checkName } from "./manifests.js";

const MAX_WEIGHT = 16; // a larger multiple of an adapter's update is noise
const NUMBER = /^\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?\s*$/i;

/** The parts of `global`, `global+anna` or `global:0.5+anna:1`, sorted by name: [{ name, weight }]. Throws ConfigError: a name or a
 * weight is not valid, or a name is repeated. */
export function parse(text) {
  const parts = text.split("+").map((part) => weighted(part.trim()));
  const names = parts.map(({ name }) => name).sort();
  const repeated = names.find((name, i) => name === names[i + 1]);
  if (repeated !== undefined) {
    const reason = `adapter ${quoted(repeated)} is named twice; name it once, with the sum of its weights`;
    throw new ConfigError(reason, "composition");
  }
  return parts.sort((left, right) => (left.name < right.name ? -1 : 1));
}

/** The parts in writing, which `parse` and `edgeadapt device infer --adapter` read. */
export const format = (parts) =>
  parts.map(({ name, weight }) => (weight === 1 ? name : `${name}:${pythonic(weight)}`)).join("+");

function weighted(text) {
  const colon = text.indexOf(":");
  const [name, number] = colon < 0 ? [text, "1"] : [text.slice(0, colon).trim(), text.slice(colon + 1)];
  if (!NUMBER.test(number)) {
    const reason = `weight ${quoted(number)} is not a number; write NAME:NUMBER, as in global:0.5+anna:1`;
    throw new ConfigError(reason, "composition.weight");
  }
  const weight = Number(number);
  checkName(name);
  if (!(Math.abs(weight) > 0 && Math.abs(weight) <= MAX_WEIGHT)) {
    const reason = `the weight ${number.trim()} of adapter ${quoted(name)} is 0, or not between ±${MAX_WEIGHT}`;
    throw new ConfigError(reason, "composition.weight");
  }
  return { name, weight };
}

const pythonic = (weight) =>
  Math.abs(weight) < 1e-4 ? weight.toExponential().replace(/-(\d)$/, "-0$1") : String(weight);

/** The adapter that `parts` make: { name, labels, rank, temperature, inputs }.
 *
 * `verified` has for each part what `Trust.adapter` returned, all for the base of manifest `base`. A single adapter of weight 1 is returned
 * unchanged.
 *
 * Throws ConfigError: the labels differ; the ranks add up to more than the base allows; the weights of adapters that replace parameters do
 * not add up to 1; an adapter with virtual tokens has another weight than 1; a prompt meets a prefix; or no adapter with a weight above 0
 * brings a head. */
export function compose(parts, verified, base) {
  const manifests = verified.map(({ manifest }) => manifest);
  const { name, labels } = manifests[0];
  const other = manifests.find((each) => JSON.stringify(each.labels) !== JSON.stringify(labels));
  if (other) {
    const reason = `adapters ${quoted(name)} and ${quoted(other.name)} have different labels`;
    throw new ConfigError(`${reason}, so their heads have no mean; use one at a time`, "composition.labels");
  }
  const weights = parts.map(({ weight }) => weight);
  const alone = parts.length === 1 && weights[0] === 1;
  const inputs = alone ? verified[0].inputs : sum(verified.map((each) => each.inputs), weights);
  const written = format(parts);
  if (VIRTUAL.every((each) => inputs.get(each)?.shape[0])) {
    const reason = `${written} has the virtual tokens of a prompt and of a prefix, whose order is not defined; leave one out`;
    throw new ConfigError(reason, "composition.virtual_tokens");
  }
  const ranks = [...inputs].filter(([key]) => hasColumns(key)).map(([, { shape }]) => shape[1]);
  const rank = Math.max(0, ...ranks);
  if (rank > base.max_rank) {
    const reason = `${written} has rank ${rank}, above the base's limit of ${base.max_rank}; leave one out`;
    throw new ConfigError(reason, "composition.rank");
  }
  // As its head, if there is one: without a weight above 0 the base's own answers.
  const headed = weights.some((weight) => weight > 0);
  const temperature = headed ? average(manifests.map((each) => each.temperature), weights) : 1;
  return { name: written, labels, rank, temperature, inputs };
}

function sum(adapters, weights) {
  const names = [...adapters[0].keys()];
  return new Map(names.map((name) => [name, composed(name, adapters.map((inputs) => inputs.get(name)), weights)]));
}

function composed(name, tensors, weights) {
  if (hasColumns(name)) return sideBySide(tensors);
  if (hasRows(name)) return stacked(tensors, weights);
  const kind = vectorKind(name);
  if (kind) return vector(name, kind, tensors, weights);
  if (isVirtual(name)) {
    const odd = weights.find((weight, i) => tensors[i].shape[0] && weight !== 1);
    if (odd === undefined) return stacked(tensors, weights.map(() => 1));
    const reason = `an adapter with virtual tokens has the weight ${odd}, but tokens have no multiple; give 1`;
    throw new ConfigError(reason, "composition.weight");
  }
  if (!weights.some((weight) => weight > 0)) {
    const reason = "a module that replaces the base's, such as a head, cannot be subtracted; give one weight above 0";
    throw new ConfigError(reason, "composition.weight");
  }
  return mean(tensors, weights);
}

/** Matrices of as many rows, [in, rankᵢ], as one of [in, Σ rankᵢ]. */
const sideBySide = (tensors) => turned(stacked(tensors.map(turned), tensors.map(() => 1)));

/** Matrices of as many columns, [rankᵢ, out], each times its weight, as one of [Σ rankᵢ, out]. */
function stacked(tensors, weights) {
  const rows = tensors.reduce((sum, { shape }) => sum + shape[0], 0);
  const columns = tensors[0].shape[1];
  const values = new Float32Array(rows * columns);
  let at = 0;
  tensors.forEach(({ values: part }, i) => {
    const weight = Math.fround(weights[i]);
    for (const value of part) values[at++] = weight * value; // rounded to float32, as numpy's product of two float32
  });
  return { shape: [rows, columns], values };
}

/** A vector, [1, width], from those that adapters have; [0, width] if none has it. */
function vector(name, kind, tensors, weights) {
  const all = tensors.map(({ shape, values }, i) => ({ shape, values, weight: weights[i] }));
  const given = all.filter(({ shape }) => shape[0]);
  if (!given.length) return tensors[0];
  if (given.length === 1 && given[0].weight === 1) return { shape: given[0].shape, values: given[0].values };
  const total = given.reduce((sum, { weight }) => sum + weight, 0);
  if (kind === REPLACED && Math.abs(total - 1) > 1e-9 * Math.max(1, Math.abs(total))) {
    const why = `is replaced with weights that add up to ${Number(total.toPrecision(6))}, not to 1`;
    const unknown = "how far that is from the base's own is not known";
    const reason = `${quoted(name.slice(0, -kind.length))} ${why}: ${unknown}; give shares, as in global:0.5+anna:0.5`;
    throw new ConfigError(reason, "composition.weight");
  }
  const neutral = SCALES.includes(kind) ? 1 : 0;
  const change = (at) => given.reduce((sum, { weight, values }) => sum + weight * (values[at] - neutral), 0);
  return { shape: given[0].shape, values: Float32Array.from(given[0].values, (_, at) => neutral + change(at)) };
}

/** The mean of tensors of one shape by the weights above 0, in double precision, so that the mean of equal ones is exact. */
const mean = (tensors, weights) => ({
  shape: tensors[0].shape,
  values: Float32Array.from(tensors[0].values, (_, at) => average(tensors.map(({ values }) => values[at]), weights)),
});

function average(numbers, weights) {
  const shares = weights.map((weight) => Math.max(weight, 0));
  const total = shares.reduce((left, right) => left + right, 0);
  return numbers.reduce((left, each, i) => left + shares[i] * each, 0) / total;
}
