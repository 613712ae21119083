// The highest version of each adapter that this browser has accepted, and its content, by set of pinned keys and by base.
//
// Stored in IndexedDB, which a worker can use too, and as safe as the browser's storage: whoever clears it or can write
// to it can go back to an older version. A native device has trust.seen.json for it (client/inference/seen.py).

import { ConfigError, TrustError, quoted } from "./errors.js";

const STORE = "versions";

export class SeenVersions {
  /** `keys` is the name of the set of pinned keys (`keySet`). */
  constructor(keys, database = "edgeadapt") {
    [this.keys, this.database] = [keys, database];
  }

  /**
   * Note the version of a verified manifest, if it is the highest so far.
   *
   * Throws TrustError: it is lower than the highest, the highest had another content, or what is stored is damaged. ConfigError: it cannot be stored.
   */
  async accept(manifest) {
    const { base_digest: base, name, version } = manifest;
    const content = contentOf(manifest);
    const place = [this.keys, base, name].join("/");
    const seen = await this.#request("readwrite", (store) => {
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

  async #request(mode, ask) {
    try {
      const database = await opened(this.database);
      try {
        const transaction = database.transaction(STORE, mode);
        const request = ask(transaction.objectStore(STORE));
        await settled(transaction, "oncomplete", "onabort", "onerror");
        return request.result;
      } finally {
        database.close();
      }
    } catch (error) {
      throw new ConfigError(`the browser cannot note accepted versions (${error}); allow this page to store data`, "seen");
    }
  }
}

/** What the adapter is, whatever its name, version and number format. */
const contentOf = ({ source, layout_digest, peft_config, parent, labels, temperature }) =>
  JSON.stringify([source, layout_digest, peft_config, parent, labels, temperature]);

async function opened(name) {
  const request = indexedDB.open(name, 2); // 1 held versions without content
  request.onupgradeneeded = () => {
    for (const store of request.result.objectStoreNames) request.result.deleteObjectStore(store);
    request.result.createObjectStore(STORE);
  };
  await settled(request, "onsuccess", "onerror", "onblocked");
  return request.result;
}

const settled = (target, done, ...failed) =>
  new Promise((resolve, reject) => {
    target[done] = resolve;
    for (const name of failed) target[name] = () => reject(target.error ?? new Error(name.slice(2)));
  });
