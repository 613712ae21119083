// The highest version of each adapter that this browser has accepted, and its content, by set of pinned keys and by base.
//
// Whoever clears the browser's storage, or can write to it, can go back to an older version. A native device has trust.seen.json for it (client/inference/seen.py).

import { TrustError, quoted } from "./errors.js";
import { VERSIONS, transact } from "./storage.js";

export class SeenVersions {
  /** `keys` is the name of the set of pinned keys (`keySet`). */
  constructor(keys) {
    this.keys = keys;
  }

  /**
   * Note the version of a verified manifest, if it is the highest so far.
   *
   * Throws TrustError: it is lower than the highest, the highest had another content, or what is stored is damaged. ConfigError: it cannot be stored.
   */
  async accept(manifest) {
    const { name, version } = manifest;
    const content = contentOf(manifest);
    const place = this.#place(manifest);
    const seen = await transact(VERSIONS, "readwrite", (store) => {
      const request = store.get(place); // in one transaction, so that another tab's higher version stays
      request.onsuccess = () => (request.result?.version >= version ? null : store.put({ version, content }, place));
      return request;
    });
    if (seen !== undefined && !(Number.isSafeInteger(seen.version) && typeof seen.content === "string")) {
      throw new TrustError("the noted versions are damaged; clear the page's data only if you trust the bundle", "seen");
    }
    if (version < seen?.version) {
      throw new TrustError(
        `adapter ${quoted(name)} is version ${version}, but version ${seen.version} was accepted here before; ` +
          "copy the current bundle",
        "adapter-manifest.version",
      );
    }
    if (version === seen?.version && content !== seen.content) {
      throw new TrustError(
        `adapter ${quoted(name)} has another content than the version ${version} that was accepted here before; ` +
          "copy the current bundle, or export the new content under the next version",
        "adapter-manifest.source",
      );
    }
  }

  /** The highest version that was accepted of the adapter of a manifest; 0 if none was. Throws ConfigError. */
  async highest(manifest) {
    const seen = await transact(VERSIONS, "readonly", (store) => store.get(this.#place(manifest)));
    return seen?.version ?? 0;
  }

  #place({ base_digest: base, name }) {
    return [this.keys, base, name].join("/");
  }
}

/** What the adapter is, whatever its name, version and number format. */
const contentOf = ({ source, layout_digest, peft_config, parent, labels, temperature }) =>
  JSON.stringify([source, layout_digest, peft_config, parent, labels, temperature]);
