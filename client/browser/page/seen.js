// The highest version of every adapter that this browser has accepted, by set of pinned keys and by base.
//
// Kept in IndexedDB, which a worker can reach too. As good as the browser's storage: who clears it, or can write into
// it, can go back to an older version; the counterpart on a disk is trust.seen.json (client/inference/trust.py).

import { ConfigError, TrustError } from "./errors.js";

const STORE = "versions";

export class SeenVersions {
  /** `keys` is the name of the set of pinned keys (`keySet`). */
  constructor(keys, database = "edgeadapt") {
    [this.keys, this.database] = [keys, database];
  }

  /** The highest accepted version, or undefined. Throws ConfigError, TrustError if the note is damaged. */
  async highest(base, name) {
    const version = await this.#request("readonly", (store) => store.get(this.#place(base, name)));
    if (version !== undefined && !Number.isSafeInteger(version)) {
      throw new TrustError("the noted versions are damaged; clear the page's data only if you trust the bundle");
    }
    return version;
  }

  async note(base, name, version) {
    const place = this.#place(base, name);
    await this.#request("readwrite", (store) => {
      const request = store.get(place); // in one transaction, so that another tab's higher version stays
      request.onsuccess = () => (request.result >= version ? null : store.put(version, place));
      return request;
    });
  }

  #place(base, name) {
    return [this.keys, base, name].join("/");
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
      throw new ConfigError(`the browser cannot note accepted versions (${error}); allow this page to store data`);
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
