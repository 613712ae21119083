import assert from "node:assert/strict";
import test from "node:test";

import { ConfigError, TrustError } from "../../../client/browser/page/errors.js";
import { Store } from "../../../client/browser/page/storage.js";

const put = (store, key, value) => store.transact("versions", [], () => [[key, value]]);
const get = async (store, key) => (await store.transact("versions", [key]))[0];

test("transactions are done one after the other, also with changes that follow from what was there", async () => {
  const store = new Store();
  const raise = () => store.transact("versions", ["a", "b"], (a = 0, b = 0) => [["a", a + 1], ["b", b + 2]]);
  assert.deepEqual(await Promise.all([raise(), raise(), raise()]), [[undefined, undefined], [1, 2], [2, 4]]);
  assert.equal(await get(store, "a"), 3);
  await put(store, "a", undefined);
  assert.equal(await get(store, "a"), undefined);
});

test("a record is a copy, and a failed write or transaction leaves the one before", async () => {
  class Full extends Store {
    async write(store, records) {
      if (this.full) throw new Error("no room");
      return super.write(store, records);
    }
  }
  const [store, record] = [new Full(), { version: 1 }];
  await put(store, "a", record);
  record.version = 2;
  store.full = true;
  await assert.rejects(put(store, "a", record), (error) => error instanceof ConfigError && error.about === "versions");
  store.full = false;
  const broken = [["a", record], null];
  await assert.rejects(store.transact("versions", [], () => broken), ConfigError);
  assert.deepEqual(await get(store, "a"), { version: 1 });
});

test("what an app's store refuses to read stays its own error", async () => {
  const store = Object.assign(new Store(), { read: async () => Promise.reject(new TrustError("damaged", "seen")) });
  await assert.rejects(get(store, "a"), TrustError);
});

test("a lock is held by one; others are told, wait, or give up", async () => {
  const store = new Store();
  let free;
  const first = store.lock("learn", {}, () => new Promise((done) => (free = done)));
  await Promise.resolve();
  assert.equal(await store.lock("learn", { ifAvailable: true }, (lock) => lock), null);
  const reason = new Error("patience");
  await assert.rejects(store.lock("learn", { signal: AbortSignal.abort(reason) }, () => "work"), reason);
  const ended = new AbortController();
  const late = assert.rejects(store.lock("learn", { signal: ended.signal }, () => "work"), reason);
  ended.abort(reason);
  await late;
  const next = store.lock("learn", {}, (lock) => lock.name);
  free("done");
  assert.deepEqual([await first, await next], ["done", "learn"]);
  await assert.rejects(store.lock("learn", {}, () => Promise.reject(reason)), reason);
  assert.equal(await store.lock("learn", { ifAvailable: true }, (lock) => lock?.name), "learn");
});
