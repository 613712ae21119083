import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { encode } from "../../../client/browser/page/bytes.js";
import { ConfigError, TrustError } from "../../../client/browser/page/errors.js";
import { blocks, checkCombination, governed, judged, policyOf } from "../../../client/browser/page/policy.js";

const vectors = JSON.parse(readFileSync(new URL("../../vectors/policy.json", import.meta.url)));
const read = (text) => policyOf(new Map([["policy.json", encode(text)]]));
const policy = read(JSON.stringify(vectors.policy));

test("answers are judged as on other devices", () => {
  for (const { text, ranked, ...expected } of vectors.answers) {
    const found = judged(policy, [text], ranked.map(([label, probability]) => ({ label, probability })));
    assert.deepEqual({ ...found, labels: found.labels.map(({ label }) => label) }, expected);
  }
});

test("what is withheld has no labels, also where the policy says nothing instead", () => {
  const silent = { ...policy, unsure: "", denied: "" };
  const labels = ["unlock", "heat up"].map((label) => ({ label, probability: 0.1 }));
  assert.deepEqual(judged(silent, ["open"], labels), { outcome: "blocked", says: "", labels: [] });
  assert.deepEqual(judged(silent, ["open"], labels.slice(1)), { outcome: "unsure", says: "", labels: [] });
});

test("patterns find the same texts", () => {
  for (const { text, read = text, blocked } of vectors.texts) assert.equal(blocks(policy.input, [text, read]), blocked, text);
});

test("the same adapters are combined", () => {
  for (const { names, allowed } of vectors.combinations) {
    const manifests = names.map((name) => (name === "*" ? { name: "anna", parent: "a" } : { name, parent: null }));
    if (allowed) checkCombination(policy, manifests);
    else assert.throws(() => checkCombination(policy, manifests), ConfigError);
  }
});

test("what is no policy is refused", () => {
  const bodies = vectors.malformed.map((change) => JSON.stringify({ ...vectors.policy, ...change }));
  for (const text of [...bodies, "[]", "null", '{"deny":[],"deny":[]}', " ".repeat(2 ** 16) + "{}"]) {
    assert.throws(() => read(text), TrustError, text.slice(0, 99));
  }
});

test("a written answer with a forbidden pattern is not shown, also not its beginning", async () => {
  const written = async (question, ...texts) => {
    const generation = { last: null };
    async function* pieces() {
      generation.last = { finish: "end", tokens: texts.length };
      for (const text of texts) yield { id: 1, text };
    }
    let shown = "";
    for await (const { text } of governed(policy, [question], generation, pieces())) shown += text;
    return [shown, generation.last.finish];
  };
  assert.deepEqual(await written("tell me", "the SEC", "RET", " is 7"), [vectors.policy.denied, "blocked"]);
  assert.deepEqual(await written("tell me", "a sec", "retary"), ["a secretary", "end"]);
  assert.deepEqual(await written("my pin", "yes"), [vectors.policy.denied, "blocked"]);
});
