// What the page believes: files that a pinned key signed, intact, made for this base, and not older than before.
//
// The rules of client/inference/trust.py, in the same order:
// 1. The pinned keys come from outside the bundle.
// 2. The base's card carries a pinned key's signature, and every file of the base has the digest that it names.
// 3. An adapter's sidecar carries a pinned key's signature, its own name, and the base's digest.
// 4. The adapter file has the size and the digest that the sidecar names.
// 5. The version is not below the highest accepted here; then the file is parsed: finite numbers that fill exactly the
//    slots, of the layout, rank and labels of the sidecar, within the base's limit of ranks.
// 6. Only then is the version noted.

import { sha256 } from "./bytes.js";
import { parse } from "./container.js";
import { MAX_ENVELOPE } from "./dsse.js";
import { ConfigError, DataError, EdgeAdaptError, TrustError, quoted } from "./errors.js";
import { keySet, pinned } from "./keys.js";
import { adapterManifest, baseManifest } from "./manifests.js";
import { checkName, checkSlots, layoutDigest, restore } from "./ondevice.js";
import { SeenVersions } from "./seen.js";

export const MODEL = "web.onnx";
export const WEIGHTS = "model.onnx.data";
export const TOKENIZER = "tokenizer.json";
export const GENERATION = "genai_config.json";
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

  /** Trust in the keys of a trust.pem. Throws TrustError, or ConfigError where the browser has no cryptography. */
  static async open(pem) {
    if (!globalThis.crypto?.subtle) {
      throw new ConfigError("the browser verifies signatures only on HTTPS pages and on localhost; open this page there");
    }
    const keys = await pinned(pem);
    return new Trust(keys, new SeenVersions(await keySet(keys)));
  }

  /** The base (rule 2): { card, files: Map of name → bytes }. Throws TrustError, DataError. */
  async base(source) {
    const card = await this.#accepted(baseManifest, source, "base/card.json");
    const lacking = NEEDED[card.task].find((name) => !Object.hasOwn(card.files, name));
    if (lacking) throw new DataError(`the base has no ${lacking}, which a browser needs; export it again`);
    const files = new Map();
    for (const [name, digest] of Object.entries(card.files)) {
      const blob = await source.read(`base/${name}`, MAX_BASE_FILE);
      if ((await sha256(blob)) !== digest) {
        throw new TrustError(`base/${name} is not the file that was signed; fetch the bundle again`);
      }
      files.set(name, blob);
    }
    return { card, files };
  }

  /** What is said of an adapter (rule 3, without the base). Throws as `base`; ConfigError for a bad name. */
  async sidecar(source, name) {
    const path = `adapters/${checkName(name)}.json`;
    const sidecar = await this.#accepted(adapterManifest, source, path);
    if (sidecar.name !== name) {
      throw new TrustError(`${path} was signed for the adapter ${quoted(sidecar.name)}; fetch the bundle again`);
    }
    return sidecar;
  }

  /** An adapter for the base of `card` (rules 3 to 6): { sidecar, inputs }. Throws TrustError, DataError, ConfigError. */
  async adapter(source, card, name) {
    const sidecar = await this.sidecar(source, name);
    if (sidecar.base_digest !== card.base_digest) {
      const digest = card.base_digest.slice(0, 12);
      throw new TrustError(`adapter ${quoted(name)} was made for another base; fetch one for ${digest}`);
    }
    const path = `adapters/${name}.onnx_adapter`;
    const blob = await source.read(path, sidecar.size);
    if (blob.length !== sidecar.size || (await sha256(blob)) !== sidecar.sha256) {
      throw new TrustError(`${path} is not the file that was signed; fetch the adapter again`);
    }
    await this.#refuseOlder(sidecar);
    const inputs = tensors(blob, sidecar);
    await checkClaims(inputs, sidecar, card);
    await this.seen.note(sidecar.base_digest, sidecar.name, sidecar.version);
    return { sidecar, inputs };
  }

  async #accepted(accept, source, path) {
    const raw = await source.read(path, MAX_ENVELOPE);
    try {
      return await accept(raw, this.keys);
    } catch (error) {
      if (error instanceof TrustError) throw new TrustError(`${path}: ${error.message}; fetch it again`);
      throw error;
    }
  }

  async #refuseOlder({ base_digest: base, name, version }) {
    const highest = await this.seen.highest(base, name);
    if (version < highest) {
      throw new TrustError(
        `adapter ${quoted(name)} is version ${version}, but version ${highest} was accepted here before; ` +
          "fetch the current bundle",
      );
    }
  }
}

function tensors(blob, { name, format }) {
  try {
    return restore(parse(blob), format);
  } catch (error) {
    if (error instanceof EdgeAdaptError) throw new DataError(`adapter ${quoted(name)}: ${error.message}; export it again`);
    throw error;
  }
}

async function checkClaims(inputs, { name, layout_digest: layout, labels, rank }, card) {
  const sizes = checkSlots(inputs, card.slots);
  if ((await layoutDigest(inputs)) !== layout) {
    throw new DataError(`adapter ${quoted(name)} has another layout than its sidecar says; export it again`);
  }
  const ranks = [...sizes].filter(([symbol]) => symbol.startsWith("rank_")).map(([, size]) => size);
  if ((sizes.get("labels") ?? labels.length) !== labels.length || Math.max(0, ...ranks) !== rank) {
    throw new DataError(`adapter ${quoted(name)} has other labels or ranks than its sidecar says; export it again`);
  }
  if (rank > card.max_rank) {
    throw new DataError(`adapter ${quoted(name)} has rank ${rank}, above the base's limit of ${card.max_rank}`);
  }
  checkLabels(name, labels, card);
}

function checkLabels(name, labels, card) {
  if (labels.length && card.task === "text-generation") {
    throw new DataError(`adapter ${quoted(name)} names labels, of which a base for text-generation has none`);
  }
  if (new Set(labels).size !== labels.length) {
    throw new DataError(`adapter ${quoted(name)} names a label twice; export it again`);
  }
  const odd = labels.find((label) => !label.trim() || [...label].length > MAX_LABEL || !PRINTABLE.test(label));
  if (odd !== undefined) {
    throw new DataError(`adapter ${quoted(name)}: label ${quoted(odd, 40)} is no printable name; export it again`);
  }
}
