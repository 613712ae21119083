// The two signed manifests that a device reads, checked field by field (edgeadapt/formats/manifest.py).

import { encode, sha256 as digest } from "./bytes.js";
import { ConfigError, TrustError, quoted } from "./errors.js";
import { accept, isObject, sign } from "./dsse.js";
import { signer } from "./keys.js";

const boolean = (value) => typeof value === "boolean";
export const string = (value) => typeof value === "string";
export const oneOf = (...choices) => (value) => choices.includes(value);
const matching = (pattern) => (value) => string(value) && pattern.test(value);
export const listOf = (check) => (value) => Array.isArray(value) && value.every(check);
export const orNull = (check) => (value) => value === null || check(value);
export const mapOf = (key, check) => (value) => isObject(value) && Object.entries(value).every(([k, v]) => key(k) && check(v));
export const sha256 = matching(/^[0-9a-f]{64}$/);
const count = (value) => Number.isSafeInteger(value) && value >= 0;
const fileName = matching(/^[A-Za-z0-9_][A-Za-z0-9_.-]*$/); // stays inside its folder

export const between = (low, high) => (value) => typeof value === "number" && value >= low && value <= high;
const number = (value) => typeof value === "number" && value >= 0 && value < 2 ** 63;
const pairOf = (first, second) => (value) => Array.isArray(value) && value.length === 2 && first(value[0]) && second(value[1]);
const pattern = (value) => string(value) && value.length > 0 && [...value].length <= 512;

const ADAPTER_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

const PEFT_CONFIG = {
  peft_type: oneOf(
    ...["LORA", "ADALORA", "LOHA", "VERA", "IA3", "LN_TUNING", "BEFT", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"],
    ...["BOTTLENECK", "BOTTLENECK_RELU", "BOTTLENECK_GELU"],
  ),
  r: count,
  lora_alpha: number,
  target_modules: listOf(string),
  rank_pattern: listOf(pairOf(pattern, count)),
  alpha_pattern: listOf(pairOf(pattern, number)),
  use_rslora: boolean,
  use_dora: boolean,
  feedforward_modules: listOf(string),
  num_virtual_tokens: count,
  bias: oneOf("none", "all", "lora_only"),
  layers_to_transform: listOf(count), // older manifests have none
};

/** Whether a value is a PEFT config (edgeadapt/formats/peftconfig.py). */
export const isPeftConfig = (value) => isObject(value) && !misfit({ layers_to_transform: [], ...value }, PEFT_CONFIG);

const BASE = {
  base_digest: sha256,
  profile: string,
  files: mapOf(fileName, sha256),
  slots: mapOf(string, listOf(string)),
  task: oneOf("text-classification", "text-generation"),
  max_rank: count,
  independent_rows: boolean,
  onnxruntime: matching(/^[0-9]{1,4}\.[0-9]{1,4}$/), // of the native runtime; the page brings its own
  opset: count,
  merged: mapOf(sha256, matching(/^[A-Z0-9_]{1,64}$/)),
};

const PRIVACY = {
  epsilon: between(0, Number.MAX_VALUE),
  delta: between(Number.MIN_VALUE, 1 - Number.EPSILON / 2),
};

const line = (value) => string(value) && [...value].length <= 500 && /^[^\p{C}\p{Z}](?:[^\p{C}\p{Z}]| )*$/u.test(value);
const CARD = {
  owner: line,
  purpose: line,
  data: line,
  license: matching(/^[A-Za-z0-9(][A-Za-z0-9.+() -]{0,199}$/),
  languages: (value) => listOf(matching(/^(?=.{2,35}$)[A-Za-z]{2,8}(?:-[A-Za-z0-9]{1,8})*$/))(value) && value.length > 0 && value.length <= 100,
};

const ADAPTER = {
  name: string,
  sha256,
  size: count,
  format: oneOf("fp32", "fp16", "int8", "int4"),
  base_digest: sha256,
  layout_digest: sha256,
  version: count,
  source: sha256,
  peft_config: orNull(isPeftConfig),
  parent: orNull(sha256),
  rank: count,
  labels: listOf(string),
  temperature: between(0.05, 20), // edgeadapt/formats/manifest.py
  privacy: orNull((value) => isObject(value) && !misfit(value, PRIVACY)),
  policy: (value) => value === undefined || sha256(value), // of an adapter without one
  card: (value) => value === undefined || (isObject(value) && !misfit(value, CARD)),
};

/** `name`, if an adapter and its two files can have it on any system. Throws ConfigError. */
export function checkName(name) {
  if (!ADAPTER_NAME.test(name)) {
    throw new ConfigError(`adapter name ${quoted(name)} must be 1 to 64 letters, digits, '.', '_' or '-'`, "name");
  }
  return name;
}

/** The manifest of a base. Throws TrustError: no pinned key signed it, or a field is missing, unknown or ill-formed. */
export const baseManifest = (raw, keys) => manifest(raw, "base-manifest", BASE, keys);

/** The manifest of an adapter. Throws as `baseManifest`. */
export const adapterManifest = (raw, keys) => manifest(raw, "adapter-manifest", ADAPTER, keys);

/** The signed envelope of the manifest of an adapter. `key` is a key pair of `signingKey`. */
export const signedAdapterManifest = async (body, key) => sign(body, typeOf("adapter-manifest"), await signer(key));

/** SHA-256 of what an adapter is, whatever its name, version, number format, privacy and card, as `AdapterManifest.content`; of a
 * manifest whose alphas are whole numbers, as those of every adapter that a federation trains. */
export function contentDigest(manifest) {
  const same = { name: "", version: 0, sha256: "", size: 0, format: "", privacy: null, card: undefined };
  return digest(encode(canonical({ ...manifest, ...same })));
}

/** JSON as edgeadapt/formats/jsontext.py writes it, where `temperature` alone is a float. */
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical)}]`;
  if (!isObject(value)) return JSON.stringify(value);
  const written = (name) => (name === "temperature" && Number.isInteger(value[name]) ? `${value[name]}.0` : canonical(value[name]));
  const says = (name) => value[name] !== undefined && (name !== "layers_to_transform" || value[name].length);
  const names = Object.keys(value).filter(says);
  return `{${names.sort().map((name) => `${JSON.stringify(name)}:${written(name)}`)}}`;
}

const typeOf = (name) => `application/vnd.edgeadapt.${name}.v1+json`;

async function manifest(raw, name, fields, keys) {
  const body = await accept(raw, typeOf(name), keys);
  if (!isObject(body)) throw new TrustError(`${name}: it is not an object`, name);
  const [field, why] = misfit(fields === ADAPTER ? { policy: undefined, card: undefined, ...body } : body, fields) ?? [];
  if (field) throw new TrustError(`${name}: field ${field} ${why}`, `${name}.${field}`);
  return body;
}

/** The field, and the reason, why `body` does not have exactly these fields; or undefined. */
export function misfit(body, fields) {
  for (const [name, check] of Object.entries(fields)) {
    if (!Object.hasOwn(body, name)) return [name, "is missing; get a newer bundle"];
    if (!check(body[name])) return [name, "is not what this page can read"];
  }
  const extra = Object.keys(body).find((name) => !Object.hasOwn(fields, name));
  return extra === undefined ? undefined : [extra, "is unknown; get a newer page"];
}
