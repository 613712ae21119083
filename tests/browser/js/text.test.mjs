import assert from "node:assert/strict";
import test from "node:test";
import { pathToFileURL } from "node:url";

import { bytes, made } from "./made.mjs";

const site = pathToFileURL(`${process.env.EDGEADAPT_SITE}/`);
const { Text } = await import(new URL("text.js", site));
const { DataError } = await import(new URL("errors.js", site));
const text = new Text(bytes(made.phrases.tokenizer));

test("a phrase has the tokens that it has natively, cut at the same place", () => {
  assert.ok(made.phrases.ids.some(([, ids]) => ids.length === text.limit), "one is cut");
  for (const [phrase, ids] of made.phrases.ids) assert.deepEqual(text.phrase(phrase), ids, phrase);
});

test("what has no answer is refused", () => {
  for (const phrase of ["", " \n", "\ud800", "a".repeat(70000), "\u0000"]) {
    assert.throws(() => text.phrase(phrase), DataError, JSON.stringify(phrase.slice(0, 9)));
  }
});

test("a character that has only begun is held back", () => {
  const begun = { decode: () => "done \ufffd" };
  assert.equal(text.decoded.call({ tokenizer: begun }, []), "done ");
});
