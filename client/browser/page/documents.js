// The two signed documents that a device reads, field by field (adapters/manifest.py): no more, no fewer, no others.

import { TrustError } from "./errors.js";
import { accept, isObject } from "./signed.js";

const string = (value) => typeof value === "string";
const oneOf = (...choices) => (value) => choices.includes(value);
const matching = (pattern) => (value) => string(value) && pattern.test(value);
const listOf = (check) => (value) => Array.isArray(value) && value.every(check);
const orNull = (check) => (value) => value === null || check(value);
const mapOf = (key, check) => (value) => isObject(value) && Object.entries(value).every(([k, v]) => key(k) && check(v));
const sha256 = matching(/^[0-9a-f]{64}$/);
const count = (value) => Number.isSafeInteger(value) && value >= 0;
const fileName = matching(/^[A-Za-z0-9_][A-Za-z0-9_.-]*$/); // stays inside its folder

const number = (value) => typeof value === "number" && value >= 0 && value < 2 ** 63;
const pairOf = (first, second) => (value) => Array.isArray(value) && value.length === 2 && first(value[0]) && second(value[1]);
const pattern = (value) => string(value) && value.length > 0 && [...value].length <= 512;

const METHOD = {
  kind: oneOf("lora"),
  rank: count,
  alpha: number,
  targets: listOf(string),
  rank_pattern: listOf(pairOf(pattern, count)),
  alpha_pattern: listOf(pairOf(pattern, number)),
  rank_stabilized: (value) => typeof value === "boolean",
};

const CARD = {
  base_digest: sha256,
  profile: string,
  files: mapOf(fileName, sha256),
  slots: mapOf(string, listOf(string)),
  task: oneOf("text-classification", "text-generation"),
  max_rank: count,
};

const SIDECAR = {
  name: string,
  sha256,
  size: count,
  format: oneOf("fp32", "fp16", "int8", "int4"),
  base_digest: sha256,
  layout_digest: sha256,
  version: count,
  source: sha256,
  method: orNull((value) => isObject(value) && !misfit(value, METHOD)),
  parent: orNull(sha256),
  rank: count,
  labels: listOf(string),
};

/** The card of a base. Throws TrustError if no pinned key signed exactly this, or a field is not what it must be. */
export const card = (raw, keys) => document(raw, "edgeadapt/base/1", CARD, keys);

/** The sidecar of an adapter. Throws as `card`. */
export const sidecar = (raw, keys) => document(raw, "edgeadapt/adapter/1", SIDECAR, keys);

async function document(raw, kind, fields, keys) {
  const body = await accept(raw, kind, keys);
  const why = misfit(body, fields);
  if (why) throw new TrustError(`${kind}: ${why}`);
  return body;
}

/** What keeps `body` from having exactly these fields, or undefined. */
function misfit(body, fields) {
  for (const [name, check] of Object.entries(fields)) {
    if (!Object.hasOwn(body, name)) return `field ${name} is missing; get a newer bundle`;
    if (!check(body[name])) return `field ${name} is not what this page can read`;
  }
  const extra = Object.keys(body).find((name) => !Object.hasOwn(fields, name));
  return extra === undefined ? undefined : `field ${extra} is unknown; get a newer page`;
}
