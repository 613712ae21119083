// What a plan asks a device to train, as edgeadapt/rounds/task.py, and the limits within which it does, as client/training/limits.py.
//
// The parts of an adapter that a device trains in the rounds and does not share are, as in client/node/privateparts.py, { subject, values,
// ever } in the identity's record, which is of one base; null at first. A part that was private once stays private: no later round shares
// a part in `ever`, whatever the labels and the layout are.

import { sha256 as digestOf } from "../bytes.js";
import { isObject, parse } from "../dsse.js";
import { ConfigError, DataError, ProtocolError, quoted, translated } from "../errors.js";
import { between, isPeftConfig, listOf, misfit, oneOf, sha256, string } from "../manifests.js";
import { COORDINATOR, refuse } from "../aggregation/messages.js";
import { parse as tensorsOf } from "../safetensors.js";
import { bottleneckEndings, bottleneckOf } from "../graphinputs.js";
import { MAGNITUDE } from "./dora.js";

export const [A, B, VECTORS, HEAD, R] = ["A", "B", "vectors", "head", "R"]; // edgeadapt/methods/parts.py
const parts = listOf(oneOf(A, B, VECTORS, HEAD, R));
const whole = (low, high) => (value) => Number.isSafeInteger(value) && low <= value && value <= high;
const TINY = Number.MIN_VALUE;

const TASK = {
  peft_config: isPeftConfig,
  labels: listOf(string),
  epochs: whole(1, 100),
  batch_size: whole(1, 1024),
  learning_rate: between(TINY, 1),
  weight_decay: between(0, 1),
  proximal: between(0, 1000),
  trained: parts,
  shared: parts,
  optimizer: oneOf("adamw", "sgd"),
  momentum: between(0, 1 - Number.EPSILON / 2),
  schedule: oneOf("constant", "linear", "cosine"),
  gradient_norm: between(0, Number.MAX_VALUE),
  variants: whole(0, 16),
};

const ANALYTIC = {
  peft_config: isPeftConfig,
  labels: listOf(string),
  ridge: (value) => value === "gcv" || between(TINY, 1)(value),
  scale: between(TINY, 1000),
};

const EVALUATION = {
  peft_config: isPeftConfig,
  labels: listOf(string),
  newest: sha256,
  previous: sha256,
  most: whole(1, 2 ** 16),
};

export const LIMITS = {
  maximum_magnitude: 1000,
  maximum_parameters: 2 ** 24,
  maximum_scaling: 64,
  minimum_labels: 2,
  maximum_labels: 1024,
  maximum_learning_rate: 0.1,
  maximum_weight_decay: 0.1,
  maximum_momentum: 0.99,
  maximum_proximal: 10,
  maximum_gradient_norm: 10,
  maximum_epochs: 10,
  minimum_batch_size: 2,
  maximum_batch_size: 64,
  moments: true, // whether to contribute to an analytic head
};

/** The task in a plan, of one of the kinds of edgeadapt/rounds/taskkinds.py: `isAnalytic` and `isEvaluation` tell which. Throws
 * ProtocolError: not a task, or one that a tab cannot train. */
export function decodeTask(raw) {
  const odd = () => refuse("task: it is not a JSON object", "task");
  const found = translated(() => parse(raw), odd);
  if (!isObject(found)) odd();
  if (isAnalytic(found)) return classifying(found, ANALYTIC, "a language model has no analytic head");
  if (isEvaluation(found)) {
    classifying(found, EVALUATION, "a language model gives no right answers");
    if (found.newest === found.previous) refuse("the task compares a release with itself", "task.newest");
    return found;
  }
  if (["histograms", "cells"].some((name) => Object.hasOwn(found, name)))
    refuse("this device contributes no observations", "task.observations");
  if (!Object.hasOwn(found, "variants")) found.variants = 0; // not written
  requireFields(found, TASK);
  const { trained, shared } = found;
  if (!(found.learning_rate * (found.proximal + found.weight_decay) < 1)) {
    const text = "the learning rate times the proximal weight and the weight decay together must be below 1";
    refuse(`task.proximal: ${text}`, "task.proximal");
  }
  if (!trained.some((part) => shared.includes(part))) {
    refuse("task.shared: no part of the adapter is both trained and shared", "task.shared");
  }
  const withR = [trained, shared].filter((parts) => parts.includes(R));
  if (withR.length === 1 || withR.some((parts) => parts.includes(A) || parts.includes(B))) {
    refuse("R is trained and shared without A and B, or not at all", "task.parts");
  }
  return found;
}

/** The adapter of a plan, from its file. Throws ProtocolError: the file is not the plan's, or damaged. */
export async function adapterOf({ adapter_digest: digest }, blob) {
  if (!blob || (await digestOf(blob)) !== digest) {
    refuse("the adapter in the message does not match the digest in the plan", "plan.adapter_digest");
  }
  return ProtocolError.blaming(COORDINATOR, DataError, () => tensorsOf(blob));
}

export const isAnalytic = (task) => Object.hasOwn(task, "ridge");

/** Whether a task counts right answers (edgeadapt/rounds/evaluation.py). */
export const isEvaluation = (task) => Object.hasOwn(task, "newest");

function requireFields(found, fields) {
  const [field, why] = misfit(found, fields) ?? [];
  if (field) refuse(`task.${field}: it ${why}`, `task.${field}`);
}

function classifying(found, fields, otherwise) {
  requireFields(found, fields);
  if (!found.labels.length) refuse(otherwise, "task.labels");
  return found;
}

/** Returns if the labels of a task, in their order, are those of an adapter in the device's signed bundle, whose labels are `signed`;
 * else throws ProtocolError. They say which examples count, so a coordinator does not choose them (client/node/tasklabels.py). */
export function requireLabels(labels, signed) {
  const isSame = (own) => own.length === labels.length && own.every((label, i) => label === labels[i]);
  if (signed.some(isSame)) return;
  if (!signed.length) refuse("task.labels: this device's bundle has no adapter, and so no labels: get one with an adapter", "task.labels");
  const [own] = signed;
  const number = [...own, ...labels].findIndex((_, i) => own[i] !== labels[i]);
  const [found, expected] = [labels, own].map((all) => (number < all.length ? quoted(all[number], 40) : "missing"));
  const remedy = "train with the labels of the release, or update the bundle";
  refuse(`task.labels: label ${number} of the task is ${found}, and that of this device's signed bundle is ${expected}: ${remedy}`, "task.labels");
}

/** Returns if the task and the adapter, a Map of name → { values }, are within `limits`; else throws ProtocolError. */
export function checkLimits(task, adapter, limits = LIMITS) {
  const { peft_config: config, labels } = task;
  checkTrainable(config);
  if (isAnalytic(task) && !limits.moments) refuse("this device contributes to no analytic head", "task.moments");
  const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  const tensors = [...adapter.values()];
  const found = {
    "adapter.magnitude": Math.max(...tensors.map(({ values }) => largest(values))),
    "adapter.parameters": tensors.reduce((sum, { values }) => sum + values.length, 0),
    "task.scaling": config.lora_alpha / (config.use_rslora ? Math.sqrt(config.r) : config.r),
    ...(labels.length ? { "task.labels": labels.length } : {}), // a language model has none
    ...Object.fromEntries(numbersIn(task).map((name) => [`task.${name}`, task[name]])),
    ...(task.epochs ? { "task.epochs": task.epochs * (1 + task.variants) } : {}),
  };
  for (const [about, value] of Object.entries(found)) checkNumber(about, value, limits);
}

/** The numbers that a coordinator chooses with a task, except those that need no limit (edgeadapt/rounds/tasklimits.py). */
function numbersIn(task) {
  const free = isAnalytic(task) ? ["ridge", "scale"] : isEvaluation(task) ? ["most"] : ["variants"];
  return Object.keys(task).filter((name) => typeof task[name] === "number" && !free.includes(name));
}

function checkNumber(about, value, limits) {
  const [, name] = about.split(".");
  const [low, high] = [limits[`minimum_${name}`], limits[`maximum_${name}`]];
  if (low === undefined && high === undefined) refuse(`${about} ${value} has no limit on this device`, about);
  if (value < low) refuse(`${about} ${value} is below this device's minimum of ${low}`, about);
  // A larger norm than the device's own is not the one that it clips to.
  if (value > high && name !== "gradient_norm") refuse(`${about} ${value} is over this device's maximum of ${high}`, about);
}

/** Refuse a method that a tab does not train, as `require_trainable` of edgeadapt/formats/peftconfig.py. Throws ConfigError. */
function checkTrainable(config) {
  const { peft_type: method, r, lora_alpha: alpha, target_modules: targets } = config;
  const neck = Boolean(bottleneckEndings(config));
  const rules = {
    peft_type: method === "LORA" || neck,
    r: r >= 1 && r <= 1024,
    lora_alpha: neck ? alpha === 0 : Number.isInteger(alpha) && alpha >= 1,
    use_rslora: !neck || !config.use_rslora,
    use_dora: !neck || !config.use_dora,
    target_modules: targets.length > 0,
    rank_pattern: !config.rank_pattern.length,
    alpha_pattern: !config.alpha_pattern.length,
    feedforward_modules: !config.feedforward_modules.length,
    num_virtual_tokens: config.num_virtual_tokens === 0,
    bias: config.bias === "none",
  };
  const odd = Object.keys(rules).find((name) => !rules[name]);
  if (odd) throw new ConfigError(`${odd} is not that of LoRA, DoRA or a bottleneck adapter, which alone a tab trains`, odd);
}

export function partOf(name) {
  if (name.endsWith(MAGNITUDE) || bottleneckOf(name)) return VECTORS;
  const [, factor] = /\.lora_([ABR])\./.exec(name) ?? [];
  return { A, B, R }[factor] ?? HEAD;
}

/** What private parts belong to: the base, and the method, labels and layout of the adapter. */
export const subjectOf = ({ base_digest: base, layout_digest: layout }, { peft_config: config, labels }) => JSON.stringify([base, config, labels, layout]);

export const isPrivate = ({ trained, shared }, part) => trained.includes(part) && !shared.includes(part);
const privateOf = (values, task) => [...values].filter(([name]) => isPrivate(task, partOf(name)));

/** The values, with those of the parts that are private in the task as `kept` has them. */
export function withPrivate(values, kept, subject, task) {
  return kept?.subject === subject ? new Map([...values, ...privateOf(kept.values, task)]) : values;
}

/** What to keep after a round; null if its task has no private parts, so that `kept` stays. */
export function toKeep(kept, subject, trained, task) {
  const values = new Map(privateOf(trained, task));
  const ever = new Set([...(kept?.ever ?? []), ...[...values.keys()].map(partOf)]);
  return values.size ? { subject, values, ever: [...ever].sort() } : null;
}

/** Check that a task shares no part that was ever private. An update of R is one of B, to which it is added. Throws ProtocolError: it shares one. */
export function checkUnshared(kept, { shared }) {
  const changed = shared.map((part) => (part === R ? B : part));
  const refused = kept?.ever.find((part) => changed.includes(part));
  if (!refused) return;
  const text = `task.shared: this device keeps the part ${refused} to itself, because it trained it without sharing it: take a method that does not share it, or ask its person to forget its identity`;
  refuse(text, "task.shared");
}
