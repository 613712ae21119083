// What is kept: stores of records by key, in IndexedDB, which a worker can use too, or in a `Store` that an app gives. A transaction is
// done as a whole or not at all: a tab that is closed in the middle leaves the record that was there. It is as safe as the browser's
// storage: whoever can write to the profile, or clear it, can change it.

import { ConfigError, translated } from "./errors.js";

const DATABASE = "edgeadapt";
const VERSION = 4; // to be raised with each new store
export const VERSIONS = "versions"; // accepted versions of adapters (trust.js)
export const IDENTITIES = "identities"; // of this browser as a device (identity.js)
export const LEARNED = "learned"; // what a person taught (learning/history.js)
const STORES = [VERSIONS, IDENTITIES, LEARNED];

/** The records of a store at `keys`, undefined where there is none. `change`, if there is one, is called with them, and returns what to put
 * at which keys in the same transaction, [[key, record]]; undefined deletes. Throws ConfigError: the browser does not store it, as with a
 * full disk, or with storage that is not allowed. */
export function transact(store, keys, change) {
  return translated(async () => {
    const database = await opened();
    try {
      const transaction = database.transaction(store, change ? "readwrite" : "readonly", { durability: "strict" });
      const records = transaction.objectStore(store);
      const requests = keys.map((key) => records.get(key));
      const found = () => requests.map(({ result }) => result);
      const work = () => change?.(...found()).forEach(([key, record]) => (record === undefined ? records.delete(key) : records.put(record, key)));
      if (requests.length) requests.at(-1).onsuccess = work;
      else work();
      await settled(transaction, "oncomplete", "onabort", "onerror");
      return found();
    } finally {
      database.close();
    }
  }, (error) => new ConfigError(`the browser cannot store ${store} (${error}); allow this page to store data, or make room`, store));
}

async function opened() {
  const request = indexedDB.open(DATABASE, VERSION);
  request.onupgradeneeded = () => {
    const { result: database } = request;
    // What is there stays: the key of an identity cannot be made again.
    const lacking = STORES.filter((store) => !database.objectStoreNames.contains(store));
    for (const store of lacking) database.createObjectStore(store);
  };
  await settled(request, "onsuccess", "onerror", "onblocked");
  return request.result;
}

const settled = (target, done, ...failed) =>
  new Promise((resolve, reject) => {
    target[done] = resolve;
    for (const name of failed) target[name] = () => reject(target.error ?? new Error(name.slice(2)));
  });

/** The browser's own: IndexedDB, and the locks that all tabs share. */
export const BROWSER = { transact, lock: (name, options, work) => navigator.locks.request(name, options, work) };

/** The same for one process without them, such as Node's: records in memory. A class derived from it keeps more by its own `read` and
 * `write`. Records can be cloned; those of VERSIONS can be written as JSON too, the others contain keys that no script can read. */
export class Store {
  #records = new Map(); // store → its records by key
  #held = new Map(); // lock → settled once it is free
  #last = Promise.resolve();

  /** The records of a store, a Map; undefined before the first `write`. */
  async read(store) {
    return this.#records.get(store);
  }

  /** Replace the records of a store as a whole. */
  async write(store, records) {
    this.#records.set(store, records);
  }

  transact(store, keys, change) {
    const found = this.#last.then(() => this.#transact(store, keys, change));
    this.#last = found.catch(() => {});
    return found;
  }

  #transact(store, keys, change) {
    return translated(async () => {
      const records = new Map(await this.read(store));
      const found = keys.map((key) => structuredClone(records.get(key)));
      for (const [key, record] of change?.(...found) ?? []) {
        if (record === undefined) records.delete(key);
        else records.set(key, structuredClone(record));
      }
      if (change) await this.write(store, records);
      return found;
    }, (error) => new ConfigError(`the store of this app does not keep ${store} (${error}); make room, or repair it`, store));
  }

  /** As `navigator.locks.request`, with `ifAvailable` or `signal`. */
  async lock(name, { ifAvailable = false, signal }, work) {
    while (this.#held.has(name)) {
      if (ifAvailable) return work(null);
      signal?.throwIfAborted();
      const aborted = new Promise((_, reject) => signal?.addEventListener("abort", () => reject(signal.reason)));
      await Promise.race([this.#held.get(name), aborted]);
    }
    const done = Promise.resolve({ name }).then(work);
    this.#held.set(name, done.catch(() => {}));
    return done.finally(() => this.#held.delete(name));
  }
}
