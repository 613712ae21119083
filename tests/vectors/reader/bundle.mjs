// A bundle, verified rule by rule (docs/reference/bundle-format.md, "Rules").

import { isA, isB, parse as parseContainer, restore } from "./container.mjs";
import { byCodePoint, canonical, parse as parseJson } from "./json.mjs";
import { Refused, require } from "./refused.mjs";
import { accept, pinnedKeys, sha256 } from "./signed.mjs";

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;
const FILE = /^[A-Za-z0-9_][A-Za-z0-9_.-]*$/;
const NEEDED = {
  "text-classification": ["model.onnx", "tokenizer.json"],
  "text-generation": ["model.onnx", "tokenizer.json", "genai_config.json"],
};
const LANGUAGE = /^(?=.{2,35}$)[A-Za-z]{2,8}(?:-[A-Za-z0-9]{1,8})*$/;
const MAX_LABEL = 256; // characters
const UNPRINTABLE = /[\p{C}\p{Z}]/u;
const MAX_SEEN = 2 ** 22; // bytes

const text = (value) => typeof value === "string";
const number = (low, high) => (value) => ["number", "bigint"].includes(typeof value) && value >= low && value <= high;
const integer = (value) => typeof value === "bigint" && value >= 0n && value < 2n ** 63n;
const digest = (value) => text(value) && /^[0-9a-f]{64}$/.test(value);
const oneOf = (...choices) => (value) => choices.includes(value);
const epsilon = number(0, Number.MAX_VALUE);
const delta = number(Number.MIN_VALUE, 1 - Number.EPSILON / 2);
const orNull = (form) => (value) => value === null || form(value);
const listOf = (form) => (value) => Array.isArray(value) && value.every(form);
const mapOf = (key, form) => (value) => value instanceof Map && [...value].every(([k, v]) => key(k) && form(v));

const BASE = {
  base_digest: digest,
  task: oneOf(...Object.keys(NEEDED)),
  profile: text,
  files: mapOf((name) => FILE.test(name), digest),
  slots: mapOf(text, listOf(text)),
  max_rank: integer,
  independent_rows: (value) => typeof value === "boolean",
  onnxruntime: (value) => text(value) && /^[0-9]{1,4}\.[0-9]{1,4}$/.test(value),
  opset: integer,
  merged: mapOf(digest, (value) => text(value) && /^[A-Z0-9_]{1,64}$/.test(value)),
};
const ADAPTER = {
  name: text,
  sha256: digest,
  size: integer,
  format: oneOf("fp32", "fp16", "int8", "int4"),
  base_digest: digest,
  layout_digest: digest,
  version: integer,
  source: digest,
  peft_config: orNull((value) => value instanceof Map),
  parent: orNull(digest),
  rank: integer,
  labels: listOf(text),
  temperature: number(0.05, 20),
  privacy: orNull((value) => value instanceof Map && value.size === 2 && epsilon(value.get("epsilon")) && delta(value.get("delta"))),
};

const line = (value) => text(value) && /^(?! )(?:[^\p{C}\p{Z}]| ){1,500}$/u.test(value);
const CARD = {
  owner: line,
  purpose: line,
  data: line,
  license: (value) => text(value) && /^[A-Za-z0-9(][A-Za-z0-9.+() -]{0,199}$/.test(value),
  languages: (value) => listOf((each) => text(each) && LANGUAGE.test(each))(value) && value.length > 0 && value.length <= 100,
};
const isCard = (value) =>
  value instanceof Map && value.size === 5 && Object.entries(CARD).every(([name, form]) => form(value.get(name)));
const OPTIONAL = { policy: digest, card: isCard }; // may be missing

/**
 * Open the adapter `name`. `files` has read(path) → Buffer or null, and list(folder) → names.
 *
 * Returns { base, manifest, tensors, seen }: the two manifests, the tensors by graph input, the next trust.seen.json.
 * Throws Refused.
 */
export function open(files, name) {
  const keys = pinnedKeys(files.read("trust.pem"));
  const base = openBase(files, keys);
  const manifest = openManifest(files, name, keys);
  require(manifest.get("base_digest") === base.get("base_digest"), "base", "made for another base");
  const governing = manifest.get("parent") === null ? [manifest] : shared(files, keys, base, manifest.has("policy"));
  const policy = base.get("files").get("policy.json");
  require(governing.every((each) => each.get("policy") === policy), "policy", "another policy than the bundle's");
  const blob = present(files.read(`bundle/adapters/${name}.onnx_adapter`));
  const stated = BigInt(blob.length) === manifest.get("size") && sha256(blob) === manifest.get("sha256");
  require(stated, "digest", "the adapter file was altered");
  const tensors = restore(parseContainer(blob), manifest.get("format"));
  checkStated(tensors, manifest, base);
  return { base, manifest, tensors, seen: noted(files.read("trust.seen.json"), manifest) };
}

function openBase(files, keys) {
  const manifest = document(present(files.read("bundle/base/manifest.json")), "base-manifest", BASE, keys);
  const listed = manifest.get("files");
  for (const name of NEEDED[manifest.get("task")]) require(listed.has(name), "needed", `no ${name} is listed`);
  const known = (name) => name.startsWith(".") || name === "manifest.json" || listed.has(name);
  for (const name of files.list("bundle/base")) require(known(name), "unlisted", name);
  const found = [...listed].map(([name, expected]) => [name, expected, present(files.read(`bundle/base/${name}`))]);
  for (const [name, expected, content] of found) require(sha256(content) === expected, "digest", name);
  return manifest;
}

function openManifest(files, name, keys) {
  require(NAME.test(name), "name", "no adapter can have this name");
  const manifest = document(present(files.read(`bundle/adapters/${name}.json`)), "adapter-manifest", ADAPTER, keys);
  require(manifest.get("name") === name, "name", "signed for another adapter");
  return manifest;
}

/** The manifests of the shared adapters, whose policy personal ones are under too. */
function shared(files, keys, base, governed) {
  const names = files.list("bundle/adapters").filter((each) => each.endsWith(".json") && !each.startsWith("."));
  const found = names.map((each) => {
    try {
      return openManifest(files, each.slice(0, -5), keys);
    } catch (error) {
      if (!(error instanceof Refused) || governed || base.get("files").has("policy.json")) throw error;
      return null;
    }
  });
  return found.filter((each) => each?.get("parent") === null && each.get("base_digest") === base.get("base_digest"));
}

function document(raw, kind, fields, keys) {
  const body = accept(raw, `application/vnd.edgeadapt.${kind}.v1+json`, keys);
  require(body instanceof Map, "manifest", "not an object");
  for (const [name, form] of Object.entries(fields)) require(body.has(name) && form(body.get(name)), "manifest", name);
  const missing = fields === ADAPTER ? Object.entries(OPTIONAL) : [];
  const more = missing.filter(([name, form]) => body.has(name) && form(body.get(name))).length;
  require(body.size === Object.keys(fields).length + more, "manifest", "an unknown field");
  return body;
}

function present(content) {
  require(content, "missing", "a file is missing");
  return content;
}

function checkStated(tensors, manifest, base) {
  const sizes = filled(tensors, base.get("slots"));
  const ranks = [...sizes].filter(([symbol]) => symbol.startsWith("rank_")).map(([, each]) => each);
  const rank = BigInt(Math.max(0, ...ranks));
  require(rank <= base.get("max_rank") && rank === manifest.get("rank"), "rank", String(rank));
  require(sha256(layout(tensors)) === manifest.get("layout_digest"), "layout", "another layout than the stated one");
  checkLabels(manifest.get("labels"), sizes.get("labels"), base.get("task"));
}

/** The size of each symbol in the dimensions of the slots. */
function filled(tensors, slots) {
  const names = (map) => [...map.keys()].sort(byCodePoint).join("\n");
  require(names(tensors) === names(slots), "slots", "other tensors than the slots");
  const sizes = new Map();
  for (const [name, dimensions] of slots) {
    const { shape } = tensors.get(name);
    require(shape.length === dimensions.length, "slots", name);
    dimensions.forEach((dimension, axis) => {
      const free = !/^[0-9]+$/.test(dimension);
      if (free && !sizes.has(dimension)) sizes.set(dimension, shape[axis]);
      require(shape[axis] === (free ? sizes.get(dimension) : Number(dimension)), "slots", name);
      require(!dimension.startsWith("given_") || shape[axis] <= 1, "slots", name);
    });
  }
  return sizes;
}

function layout(tensors) {
  const names = [...tensors.keys()].sort(byCodePoint);
  const shape = (name) => (isA(name) || isB(name) ? tensors.get(name).shape.toReversed() : tensors.get(name).shape);
  return canonical(names.map((name) => [`base_model.model.${name}`, shape(name).map(BigInt)]));
}

function checkLabels(labels, rows, task) {
  require(rows === undefined || rows === labels.length, "labels", "another number of labels than rows");
  require(task === "text-classification" || !labels.length, "labels", "a language model has none");
  require(new Set(labels).size === labels.length, "labels", "a label occurs twice");
  for (const label of labels) {
    const printable = !UNPRINTABLE.test(label.replaceAll(" ", "")) && label.trim() && [...label].length <= MAX_LABEL;
    require(printable, "labels", label);
  }
}

/** The content of trust.seen.json after `manifest` was accepted. */
function noted(raw, manifest) {
  const [base, name, version] = ["base_digest", "name", "version"].map((field) => manifest.get(field));
  const seen = raw ? readSeen(raw) : new Map();
  const [content, before] = [contentOf(manifest), seen.get(base)?.get(name)];
  if (before && version < before.get("version")) throw new Refused("version", "an older version");
  const same = before?.get("version") === version;
  require(!same || content === before.get("content"), "content", "another content under the same version");
  if (!same) {
    const entry = new Map([["content", content], ["version", version]]);
    seen.set(base, new Map([...(seen.get(base) ?? []), [name, entry]]));
  }
  return same ? raw.toString() : canonical(seen);
}

function readSeen(raw) {
  const entry = (value) =>
    value instanceof Map && value.size === 2 && digest(value.get("content")) && integer(value.get("version"));
  let seen;
  try {
    seen = raw.length <= MAX_SEEN ? parseJson(raw) : null;
  } catch (error) {
    throw new Refused("seen", error.message);
  }
  require(mapOf(digest, mapOf((name) => [...name].length <= 64, entry))(seen), "seen", "not a list of versions");
  return seen;
}

/** The digest of what an adapter is, whatever its name, version, number format, privacy and card. */
function contentOf(manifest) {
  const blank = { name: "", sha256: "", format: "", version: 0n, size: 0n, privacy: null };
  const written = { ...blank, temperature: Number(manifest.get("temperature")) };
  const stated = [...manifest].filter(([name]) => name !== "card");
  return sha256(canonical(new Map([...stated, ...Object.entries(written)])));
}
