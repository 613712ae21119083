// The bundles that the page accepts: signed by a pinned key, unaltered, and never older than before. The rules are those of
// edgeadapt/formats/bundle.py, by the same numbers, and of client/inference/trust.py (rule 6): whoever clears the storage of this browser,
// or can write to it, can go back to an older version.

import { sha256 } from "./bytes.js";
import { parse } from "./container.js";
import { MAX_ENVELOPE } from "./dsse.js";
import { ConfigError, DataError, EdgeAdaptError, TrustError, quoted } from "./errors.js";
import { checkSlots, layoutDigest } from "./graphinputs.js";
import { keySet, pinned } from "./keys.js";
import * as manifests from "./manifests.js";
import { POLICY } from "./policy.js";
import { restore } from "./quantization.js";
import { BROWSER, VERSIONS } from "./storage.js";

export const MODEL = "web.onnx";
export const WEIGHTS = "model.onnx.data";
export const TOKENIZER = "tokenizer.json";
export const TRAINING = "training.onnx";
export const LOWER = "lower.onnx";
export const PHRASES = "phrases.tsv";
export const GENERATION = "genai_config.json";
const BASE_MANIFEST = "base/manifest.json";
const NEEDED = {
  "text-classification": [MODEL, TOKENIZER],
  "text-generation": [MODEL, TOKENIZER, GENERATION],
};
const MAX_BASE_FILE = 2 ** 31; // bytes
const MAX_LABEL = 256; // characters
const PRINTABLE = /^(?:[^\p{C}\p{Z}]| )*$/u;

export class Trust {
  constructor(keys, seen) {
    [this.keys, this.seen] = [keys, seen];
  }

  /** Trust in the keys of a trust.pem, with the accepted versions in `store`. Throws TrustError, or ConfigError where the browser has no cryptography. */
  static async open(pem, store = BROWSER) {
    if (!globalThis.crypto?.subtle) {
      throw new ConfigError("the browser verifies signatures only on HTTPS pages and on localhost; open this page there", "https");
    }
    const keys = await pinned(pem);
    return new Trust(keys, new SeenVersions(await keySet(keys), store));
  }

  /** The base (rules 1 and 2): { manifest, files: Map of name → bytes }. While files are read, `progress` is called with { received,
   * total }, in bytes; `total` is null where the source does not know it. Throws TrustError, DataError. */
  async base(source, progress = () => {}) {
    const manifest = await this.baseManifest(source);
    const missing = NEEDED[manifest.task].find((name) => !Object.hasOwn(manifest.files, name));
    if (missing) throw new DataError(`the base has no ${missing}, which a browser needs; export it again`, missing);
    const sizes = await Promise.all(Object.keys(manifest.files).map((name) => source.size(`base/${name}`)));
    const total = sizes.includes(null) ? null : sizes.reduce((sum, size) => sum + size, 0);
    let received = 0;
    const count = (bytes) => progress({ received: (received += bytes), total });
    const files = new Map();
    for (const name of Object.keys(manifest.files)) files.set(name, await this.file(source, manifest, name, count));
    return { manifest, files };
  }

  /** What is signed about the base (rule 1). Throws as `base`. */
  baseManifest(source) {
    return this.#accept(manifests.baseManifest, source, BASE_MANIFEST);
  }

  /** A file of a base, by its verified manifest (rule 2). `count` as of the source. Throws TrustError, DataError. */
  async file(source, { files }, name, count) {
    const blob = await source.read(`base/${name}`, MAX_BASE_FILE, count);
    if ((await sha256(blob)) !== files[name]) throw altered(`base/${name}`);
    return blob;
  }

  /** What is signed about an adapter (rule 3). Throws as `base`; ConfigError for a name that no adapter can have. */
  async adapterManifest(source, name) {
    const path = `adapters/${manifests.checkName(name)}.json`;
    const manifest = await this.#accept(manifests.adapterManifest, source, path);
    if (manifest.name !== name) {
      const why = `was signed for the adapter ${quoted(manifest.name, 64)}; copy the bundle again`;
      throw new TrustError(`${path} ${why}`, "adapter-manifest.name");
    }
    return manifest;
  }

  /** An adapter for a base (rules 3 to 6): { manifest, inputs }. Throws TrustError, DataError, ConfigError. */
  async adapter(source, base, name) {
    const manifest = await this.adapterManifest(source, name);
    if (manifest.base_digest !== base.base_digest) {
      const digest = base.base_digest.slice(0, 12);
      const why = `was made for another base; get one for ${digest}`;
      throw new TrustError(`adapter ${quoted(name)} ${why}`, "adapter-manifest.base_digest");
    }
    if (manifest.parent === null) checkPolicy(manifest, base);
    else await this.checkPolicy(source, base);
    const path = `adapters/${name}.onnx_adapter`;
    const blob = await source.read(path, manifest.size);
    if (blob.length !== manifest.size || (await sha256(blob)) !== manifest.sha256) throw altered(path);
    const inputs = tensors(blob, manifest);
    await checkStated(inputs, manifest, base);
    await this.seen.accept(manifest);
    return { manifest, inputs };
  }

  /** Check what private adapters are under too: the policy of all shared ones (rule 4). Throws as `adapterManifest`. */
  async checkPolicy(source, base) {
    for (const name of await source.adapterNames()) {
      const manifest = await this.adapterManifest(source, name);
      if (manifest.parent === null && manifest.base_digest === base.base_digest) checkPolicy(manifest, base);
    }
  }

  async #accept(accept, source, path) {
    const raw = await source.read(path, MAX_ENVELOPE);
    try {
      return await accept(raw, this.keys);
    } catch (error) {
      if (!(error instanceof TrustError)) throw error;
      throw new TrustError(`${path}: ${error.message}; ${this.#remedy(error)}`, error.about);
    }
  }

  #remedy({ about }) {
    if (about !== "keyid") return "copy it again";
    const [first, ...more] = this.keys.map(({ id }) => quoted(id));
    const pinned = more.length ? `${first} and ${more.length} more are pinned` : `only ${first} is pinned`;
    return `${pinned}: open the bundle with the trust.pem that its vendor gave out`;
  }
}

function checkPolicy({ name, policy }, { files }) {
  if (policy === files[POLICY]) return;
  const why = "was released with another policy than the bundle has; copy the bundle again";
  throw new TrustError(`adapter ${quoted(name)} ${why}`, "adapter-manifest.policy");
}

const altered = (path) =>
  new TrustError(`${path} does not match the digest in its manifest; copy the bundle again`, path.split("/").at(-1));

function tensors(blob, { name, format }) {
  try {
    return restore(parse(blob), format);
  } catch (error) {
    if (!(error instanceof EdgeAdaptError)) throw error;
    throw new DataError(`adapter ${quoted(name)}: ${error.message}; export it again`, error.about);
  }
}

/** Refuse an adapter that is not what its manifest states, or does not fit the base (rule 5). */
async function checkStated(inputs, manifest, base) {
  const name = quoted(manifest.name);
  const sizes = checkSlots(inputs, base.slots);
  const rank = Math.max(0, ...[...sizes].filter(([symbol]) => symbol.startsWith("rank_")).map(([, size]) => size));
  if (rank > base.max_rank) {
    throw new DataError(`adapter ${name} has rank ${rank}, above the base's limit of ${base.max_rank}`, "adapter-manifest.rank");
  }
  const stated = { layout_digest: manifest.layout_digest, rank: manifest.rank, labels: manifest.labels.length };
  const found = { layout_digest: await layoutDigest(inputs), rank, labels: sizes.get("labels") ?? stated.labels };
  const other = Object.keys(found).find((field) => found[field] !== stated[field]);
  if (other) {
    const why = `does not have the ${other} that its manifest states; export it again`;
    throw new DataError(`adapter ${name} ${why}`, `adapter-manifest.${other}`);
  }
  checkLabels(name, manifest.labels, base);
}

function checkLabels(name, labels, base) {
  const refuse = (why) => {
    throw new DataError(`adapter ${name} ${why}; export it again`, "labels");
  };
  if (labels.length && base.task === "text-generation") refuse("names labels, and a base for text-generation has none");
  if (new Set(labels).size !== labels.length) refuse("names a label twice");
  const odd = labels.find((label) => !label.trim() || [...label].length > MAX_LABEL || !PRINTABLE.test(label));
  if (odd !== undefined) refuse(`has the label ${quoted(odd, 40)}, which is not a printable name`);
}

/** The highest version of each adapter that this device has accepted, by set of pinned keys and by base. */
class SeenVersions {
  /** `keys` is the name of the set of pinned keys (`keySet`). */
  constructor(keys, store) {
    [this.keys, this.store] = [keys, store];
  }

  /** Note the version of a verified manifest, if it is the highest so far. Throws TrustError: it is lower than the highest, the highest
   * had another content, or what is stored is damaged. ConfigError: it cannot be stored. */
  async accept(manifest) {
    const { name, version } = manifest;
    const content = contentOf(manifest);
    const place = this.#place(manifest);
    // In one transaction, so that another tab's higher version stays.
    const noted = (before) => (before?.version >= version ? [] : [[place, { version, content }]]);
    const [seen] = await this.store.transact(VERSIONS, [place], noted);
    if (seen !== undefined && !(Number.isSafeInteger(seen.version) && typeof seen.content === "string")) {
      throw new TrustError("the noted versions are damaged; clear the page's data only if you trust the bundle", "seen");
    }
    if (version < seen?.version) {
      const why = `is version ${version}, but version ${seen.version} was accepted here before; copy the current bundle`;
      throw new TrustError(`adapter ${quoted(name)} ${why}`, "adapter-manifest.version");
    }
    if (version === seen?.version && content !== seen.content) {
      const why = `has another content than the version ${version} that was accepted here before`;
      const remedy = "copy the current bundle, or export the new content under the next version";
      throw new TrustError(`adapter ${quoted(name)} ${why}; ${remedy}`, "adapter-manifest.source");
    }
  }

  /** The highest version that was accepted of the adapter of a manifest; 0 if none was. Throws ConfigError. */
  async highest(manifest) {
    const [seen] = await this.store.transact(VERSIONS, [this.#place(manifest)]);
    return seen?.version ?? 0;
  }

  #place({ base_digest: base, name }) {
    return [this.keys, base, name].join("/");
  }
}

/** What the adapter is, whatever its name, version and number format. */
const contentOf = ({ source, layout_digest, peft_config, parent, labels, temperature, policy }) =>
  JSON.stringify([source, layout_digest, peft_config, parent, labels, temperature, ...(policy ? [policy] : [])]);
