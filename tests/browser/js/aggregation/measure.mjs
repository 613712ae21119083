// Times what a device computes for its masked input: keys of the masks, and the masks themselves. Prints JSON, milliseconds.

import { apply, derivable, exchangeKey, pairKey, publicKey, selfKey } from "../../../../client/browser/page/aggregation/masks.js";

const [elements, neighbors, repeats] = process.argv.slice(2).map(Number);
const [context, plan] = [new Uint8Array(32), new Uint8Array(32)];
const random = () => crypto.getRandomValues(new Uint8Array(32));
const own = await exchangeKey(random());
const seed = await derivable(random());
const publics = await Promise.all(Array.from({ length: neighbors }, async () => publicKey(await exchangeKey(random()))));
const vector = new Uint16Array(elements);
const times = { keys: [], masks: [] };

for (let i = 0; i < repeats; i++) {
  const start = performance.now();
  const masks = [{ key: await selfKey(seed, context, plan, "m"), add: true }];
  for (const [j, raw] of publics.entries()) {
    const peer = `${j % 2 ? "a" : "z"}${j}`;
    masks.push({ key: await pairKey(own, raw, context, plan, ["m", peer]), add: "m" < peer });
  }
  const middle = performance.now();
  await apply(vector, masks);
  times.keys.push(middle - start);
  times.masks.push(performance.now() - middle);
}
console.log(JSON.stringify(times));
