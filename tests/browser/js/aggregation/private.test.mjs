// What a tab keeps to itself of an adapter, and which tasks it refuses for that, against a native device
// (tests/browser/test_noise.py).

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { checkUnshared, subjectOf, toKeep, withPrivate } from "../../../../client/browser/page/learning/task.js";

const { base, layout, walks } = JSON.parse(readFileSync(process.env.EDGEADAPT_PRIVATE, "utf8"));
const SPEC = { base_digest: base, layout_digest: layout };
const values = (tensors) => new Map(Object.entries(tensors).map(([name, value]) => [name, Float32Array.of(value)]));
const tensors = (values) => values && Object.fromEntries([...values].map(([name, [value]]) => [name, value]));

/** The part for which a task is refused, or null. */
function refusedPart(kept, task) {
  try {
    checkUnshared(kept, task);
    return null;
  } catch (error) {
    assert.deepEqual([error.name, error.about, error.message.includes("\n")], ["ProtocolError", "task.shared", false]);
    return /the part (\S+) to itself/.exec(error.message)[1];
  }
}

test("plans are trained from the same numbers, keep the same parts and are refused for the same one as natively", () => {
  for (const walk of walks) {
    let kept = null;
    for (const { task, offered, refused, begun, trained, ever } of walk) {
      assert.equal(refusedPart(kept, task), refused);
      if (refused) continue;
      const subject = subjectOf(SPEC, task);
      assert.deepEqual(tensors(withPrivate(values(offered), kept, subject, task)), begun);
      kept = toKeep(kept, subject, values(trained), task) ?? kept;
      assert.deepEqual(kept?.ever ?? [], ever);
    }
  }
});
