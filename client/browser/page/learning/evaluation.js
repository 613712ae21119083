// How many held-out examples the release in the bundle answers rightly: what an evaluation sums, as client/training/evaluate.py.

import { contentDigest } from "../manifests.js";
import { NO_POLICY } from "../policy.js";

/** Right answers and examples, under the newest release and under the one before: four whole numbers, those of the release that the
 * bundle does not have being 0; all of them, if it has neither. `task` is that of the round, `examples` are [{ text, target }], and
 * `pause` is awaited before each answer. What is in use stays. Throws TrustError, DataError: the bundle is damaged or breaks a rule. */
export async function ownCounts(engine, task, examples, pause) {
  const { source, trust, base } = engine;
  for (const name of await source.adapterNames()) {
    const content = await contentDigest(await trust.adapterManifest(source, name));
    if (content !== task.newest && content !== task.previous) continue;
    const verified = await trust.adapter(source, base, name);
    if ((await contentDigest(verified.manifest)) !== content) break; // an update came between the two
    const right = await rightAnswers(engine, engine.loaded([{ name, weight: 1 }], [verified]), task.labels, examples, pause);
    const counts = [right, examples.length];
    return Float64Array.from(content === task.newest ? [...counts, 0, 0] : [0, 0, ...counts]);
  }
  return new Float64Array(4);
}

async function rightAnswers(engine, adapter, labels, examples, pause) {
  let right = 0;
  for (const { text, target } of examples) {
    await pause();
    if (engine.text.unknownShare(text) === 1) continue; // the base knows no part of it, so it has no answer
    const { labels: [{ label }] } = await engine.rank(text, 1, adapter, NO_POLICY);
    right += Number(label === labels[target]);
  }
  return right;
}
