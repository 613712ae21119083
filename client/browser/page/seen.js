// The highest version of each adapter that this browser has accepted, by set of pinned keys and by base.
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
   * Throws TrustError: it is lower than the highest, or what is stored is damaged. ConfigError: it cannot be stored.
   */
  async accept({ base_digest: base, name, version }) {
    const place = [this.keys, base, name].join("/");
    const highest = await this.#request("readwrite", (store) => {
      const request = store.get(place); // in one transaction, so that another tab's higher version stays
      request.onsuccess = () => (request.result >= version ? null : store.put(version, place));
      return request;
    });
    if (highest !== undefined && !Number.isSafeInteger(highest)) {
      throw new TrustError("the noted versions are damaged; clear the page's data only if you trust the bundle", "seen");
    }
    if (version < highest) {
      throw new TrustError(
        `adapter ${quoted(name)} is version ${version}, but version ${highest} was accepted here before; ` +
          "copy the current bundle",
        "adapter-manifest.version",
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

async function opened(name) {
  const request = indexedDB.open(name, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE);
  await settled(request, "onsuccess", "onerror", "onblocked");
  return request.result;
}

const settled = (target, done, ...failed) =>
  new Promise((resolve, reject) => {
    target[done] = resolve;
    for (const name of failed) target[name] = () => reject(target.error ?? new Error(name.slice(2)));
  });
