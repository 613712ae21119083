// What the page keeps in IndexedDB, which a worker can use too: stores of records by key.
//
// A transaction is done as a whole or not at all: a tab that is closed in the middle leaves the record that was there. It
// is as safe as the browser's storage: whoever can write to the profile, or clear it, can change it.

import { ConfigError } from "./errors.js";

const DATABASE = "edgeadapt";
const VERSION = 4; // to be raised with each new store
export const VERSIONS = "versions"; // accepted versions of adapters (trust.js)
export const IDENTITIES = "identities"; // of this browser as a device (identity.js)
export const LEARNED = "learned"; // what a person taught (learning/history.js)
const STORES = [VERSIONS, IDENTITIES, LEARNED];

/**
 * The result of the request that `ask` makes of a store, after its transaction is done.
 *
 * Throws ConfigError: the browser does not store it, as with a full disk, or with storage that is not allowed.
 */
export async function transact(store, mode, ask) {
  try {
    const database = await opened();
    try {
      const transaction = database.transaction(store, mode, { durability: "strict" });
      const request = ask(transaction.objectStore(store));
      await settled(transaction, "oncomplete", "onabort", "onerror");
      return request.result;
    } finally {
      database.close();
    }
  } catch (error) {
    throw new ConfigError(`the browser cannot store ${store} (${error}); allow this page to store data, or make room`, store);
  }
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
