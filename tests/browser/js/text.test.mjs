import assert from "node:assert/strict";
import test from "node:test";
import { pathToFileURL } from "node:url";

import { growth } from "./growth.mjs";
import { bytes, made } from "./made.mjs";

const site = pathToFileURL(`${process.env.EDGEADAPT_SITE}/`);
const { readerOf, Text } = await import(new URL("text.js", site));
const { DataError } = await import(new URL("errors.js", site));

/** What is read, or what the refusal is about. */
function tried(read) {
  try {
    return read();
  } catch (error) {
    assert.ok(error instanceof DataError, String(error.stack));
    return error.about;
  }
}

for (const [name, { tokenizer, texts }] of Object.entries(made.readers)) {
  test(`a phrase has the tokens that it has natively, or is refused as natively, with the ${name} tokenizer`, () => {
    const reader = readerOf(bytes(tokenizer));
    assert.ok(texts.some(([, ids]) => ids.length === reader.limit), "one is cut");
    assert.ok(texts.some(([, ids]) => ids === "text.tokens"), "one is refused");
    assert.ok(texts.some(([, , , unread]) => unread > 4));
    for (const [text, ids, share, unread] of texts) {
      assert.deepEqual(tried(() => reader.phrase(text)), ids, JSON.stringify(text));
      assert.deepEqual(tried(() => reader.unknownShare(text)), share, JSON.stringify(text));
      assert.deepEqual(tried(() => reader.unread(text, 0, reader.limit - 4)), unread, JSON.stringify(text));
    }
  });
}

for (const [name, { tokenizer, texts }] of Object.entries(made.readers)) {
  test(`a policy judges what the ${name} tokenizer makes of a text`, () => {
    const reader = readerOf(bytes(tokenizer));
    for (const [text, , , , read] of texts) assert.equal(reader.readings(text).at(-1), read, JSON.stringify(text));
  });
}

test("a text that the base reads as another one is judged as both", () => {
  const reader = readerOf(bytes(made.readers.real.tokenizer));
  const text = "the L\u00efg\u0001ht";
  assert.deepEqual(reader.readings(text), [text, "the light"]);
});

test("what has no answer is refused", () => {
  const reader = readerOf(bytes(made.readers.real.tokenizer));
  for (const phrase of ["", " \n", "\ud800", "a".repeat(70000), "\u0000"]) {
    assert.throws(() => reader.phrase(phrase), DataError, JSON.stringify(phrase.slice(0, 9)));
  }
});

for (const [name, { tokenizer, rows }] of Object.entries(made.decoders)) {
  test(`each token completes the text that it completes natively, with a tokenizer of ${name}`, () => {
    const reader = readerOf(bytes(tokenizer));
    for (const [tokens, pieces] of rows) assert.deepEqual(tokens.map(reader.decoder()), pieces, String(tokens));
  });
}

test("only the character at the end that has begun is held back", () => {
  const begun = { decode: () => "a\ufffdb \ufffd\ufffd" };
  assert.equal(Text.prototype.decoded.call({ tokenizer: begun }, []), "a\ufffdb ");
});

test("characters that do not begin at the end cost no more than others", () => {
  const read = (text) => Text.prototype.decoded.call({ tokenizer: { decode: () => text } }, []);
  assert.ok(growth(read, (size) => `${"\ufffd".repeat(size)}a`, 2 ** 18) < 3);
});
