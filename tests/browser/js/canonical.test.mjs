import assert from "node:assert/strict";
import test from "node:test";

import { read, write } from "../../../client/browser/page/canonical.js";
import { made } from "./made.mjs";

const taken = (text) => {
  try {
    read(text);
    return true;
  } catch (error) {
    if (error instanceof SyntaxError) return false;
    throw error;
  }
};

test("a spelling is taken exactly if a native device takes it", () => {
  assert.ok(made.spellings.some(([, accepted]) => !accepted));
  for (const [text, accepted] of made.spellings) assert.equal(taken(text), accepted, text);
});

test("what is read is what the text says", () => {
  for (const [text, accepted] of made.spellings) if (accepted) assert.deepEqual({ ...[read(text)] }, { ...[plain(text)] });
});

const plain = (text) => JSON.parse(text, (_, value) => bare(value));
const bare = (value) =>
  value && typeof value === "object" && !Array.isArray(value) ? Object.assign(Object.create(null), value) : value;

test("an integer that JavaScript cannot hold is refused rather than rounded", () => {
  assert.equal(taken("9007199254740991"), true);
  assert.equal(taken("9007199254740993"), false);
});

test("deep nesting is refused, not a crash", () => {
  assert.equal(taken("[".repeat(1e6)), false);
  assert.equal(taken("[".repeat(200) + "]".repeat(200)), false);
});

test("what is written reads back", () => {
  for (const value of [["ä\u{1f600}\x7f\u0000", 1, [], null, true], [["x", [2, 3]]]]) {
    assert.deepEqual(read(write(value)), value);
  }
  assert.throws(() => write([0.5]), TypeError);
});
