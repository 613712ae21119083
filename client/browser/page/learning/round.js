// A tab's contribution to a round, as client/node/training.py: what is on offer is checked first, then it trains. The order of the two
// keeps a refusal from saying anything about the examples; so what fails once the examples matter counts as an update of zero, with the
// weight of the examples.

import { COORDINATOR, refuse } from "../aggregation/messages.js";
import {
  contribution,
  countSegments,
  momentContribution,
  momentSegments,
  noisyContribution,
  requireBounds,
  updateSegments,
} from "../aggregation/contribution.js";
import { ConfigError, DataError, ProtocolError } from "../errors.js";
import { checkSlots, fromPeft, layoutDigest, toPeft } from "../graphinputs.js";
import { contentDigest } from "../manifests.js";
import { variants } from "../media.js";
import { NO_POLICY } from "../policy.js";
import { emptyAdapter } from "../runtime.js";
import { batches, descend } from "./descent.js";
import { asSlots } from "./dora.js";
import { unfolded } from "./fedsb.js";
import { LanguageGraphTrainer } from "./languagegraph.js";
import { corrections, momentsOf } from "./moments.js";
import { LIMITS, R, adapterOf, checkLimits, decodeTask, isAnalytic, isEvaluation, partOf, requireLabels } from "./task.js";
import { checkUnshared, subjectOf, toKeep, withPrivate } from "./task.js";
import { GraphTrainer, requireMeanHead } from "./trainer.js";

const MAX_LOSS = 20; // nats, of one example (edgeadapt/rounds/task.py)
const between = (pause) => () => pause({ step: 0, steps: 0 });

/** What makes a device's contributions: (plan, spec, blob, kept) → Promise of { vector, parts }, with the adapter's file.
 *
 * `kept` are the parts of an adapter that this device trained and did not share (task.js), or null: the training goes on from them.
 * `parts` are those to keep after it, or null if the round has none.
 *
 * `examples` are [{ text, label, split }], where a label is its name or its number, and the split "train" or "validation"; of a language
 * model [{ text, prompt, split }]. `pause` is awaited between the parts of the work, with { round, step, steps }; what it throws ends it,
 * and is thrown. The function throws ProtocolError: what is on offer cannot or must not be trained. */
export function trainerOf(engine, examples, pause = async () => {}, limits = LIMITS) {
  return async (plan, spec, blob, kept = null) => {
    const [task, adapter] = [decodeTask(plan.training), await adapterOf(plan, blob)];
    const [trainer, inputs] = await opened(engine, task, adapter, limits);
    try {
      if ((await layoutDigest(inputs)) !== spec.layout_digest) refuse("offer, task and adapter have different layouts", "plan.layout");
      const [start, given] = [valuesOf(inputs), { engine, trainer, task, examples, plan, spec, pause: ends(pause, plan) }];
      // Of all devices on one scale, so without private parts.
      if (isEvaluation(task)) return { vector: await counts(given), parts: null };
      if (isAnalytic(task)) return { vector: await moments(given, start), parts: null };
      const withSquares = () => ProtocolError.blaming(COORDINATOR, DataError, () => unfolded(start, trainer.shapes));
      const whole = task.shared.includes(R) ? await withSquares() : start; // of Fed-SB
      const shared = [...whole.keys()].filter((name) => task.shared.includes(partOf(name)));
      requireBounds(spec, updateSegments(spec, shared.reduce((sum, name) => sum + whole.get(name).length, 0)));
      checkUnshared(kept, task);
      const subject = subjectOf(spec, task);
      const begun = withPrivate(whole, kept, subject, task);
      const made = async ({ trained, ...found }) => {
        const delta = update(begun, trained, shared, inputs);
        const vector = spec.privacy ? noisy(given, delta) : contribution({ delta, ...found }, spec, plan.adapter_digest);
        return { vector: await vector, parts: toKeep(kept, subject, trained, task) };
      };
      const own = await usable(given, Number(spec.weight_cap));
      return await orElse(
        async () => made(await outcome(given, begun, own, limits)),
        () => made({ trained: begun, examples: own.train.length, score: worst(own.heldOut) }),
      );
    } catch (error) {
      throw error instanceof Ended ? error.cause : error;
    } finally {
      await trainer.close();
    }
  };
}

const noisy = ({ spec, plan }, vector) => noisyContribution(vector, spec, plan.adapter_digest);

const valuesOf = (inputs) => new Map([...inputs].map(([name, { values }]) => [name, values]));

async function signedLabels({ source, trust }) {
  const manifests = [];
  for (const name of await source.adapterNames()) manifests.push(await trust.adapterManifest(source, name));
  return manifests.filter(({ parent }) => parent === null).map(({ labels }) => labels);
}

/** A trainer for an adapter, and the adapter by graph input, in the numbers of peft. */
async function opened(engine, task, tensors, limits) {
  try {
    checkLimits(task, tensors, limits);
    if (!engine.generation) {
      requireMeanHead(engine.base);
      requireLabels(task.labels, await signedLabels(engine));
    }
    const inputs = fromPeft(tensors);
    const sizes = checkSlots(new Map([...emptyAdapter(engine.base.slots), ...asSlots(inputs)]), engine.base.slots);
    const labels = engine.generation ? 0 : sizes.get("labels"); // of a language model there are none
    if (labels !== task.labels.length) throw new DataError("the base has another number of labels", "task.labels");
    const adapter = { manifest: { name: "of the plan", peft_config: task.peft_config }, inputs };
    // The slots of DoRA are made of its numbers by the training graph.
    const answers = isEvaluation(task) || (isAnalytic(task) && !task.peft_config.use_dora);
    const kind = engine.generation ? LanguageGraphTrainer : GraphTrainer;
    return [answers ? GraphTrainer.answering(engine, adapter) : await kind.open(engine, adapter, valuesOf(inputs)), inputs];
  } catch (error) {
    if (!(error instanceof DataError || error instanceof ConfigError)) throw error;
    refuse(`adapter and task: ${error.message}`, error.about || "plan.training");
  }
}

/** The contribution to an analytic head: nothing is trained. */
async function moments(given, start) {
  const { trainer, task, spec, pause } = given;
  const [d, k] = [trainer.hidden, task.labels.length];
  requireBounds(spec, momentSegments(spec, d, k));
  const { train, heldOut } = await usable(given, Number(spec.weight_cap));
  const targets = train.map(({ target }) => target);
  const zeros = new Float64Array(d);
  const embedded = async () => {
    const found = await trainer.embeddings(start, train.map(({ ids }) => ids), between(pause));
    return found.map((row) => (row.every(Number.isFinite) ? row : zeros)); // one that overflows counts all the same
  };
  if (spec.privacy) {
    return orElse(
      async () => noisy(given, corrections(await embedded(), targets, trainer.head(start))),
      () => noisy(given, new Float64Array(spec.vector.segments[0].size)),
    );
  }
  return orElse(
    async () => momentContribution(momentsOf(await embedded(), targets, d, k), await scored(trainer, start, heldOut, pause), spec),
    () => momentContribution(momentsOf(train.map(() => zeros), targets, d, k), worst(heldOut), spec),
  );
}

/** The counts of an evaluation, with noise: zeros where the device has neither release. */
async function counts(given) {
  const { engine, task, spec, pause } = given;
  if (!spec.privacy) refuse("right answers are not summed without noise", "offer.spec.vector");
  requireBounds(spec, countSegments(spec));
  return orElse(
    async () => noisy(given, await ownCounts(engine, task, (await usable(given, task.most)).heldOut, between(pause))),
    () => noisy(given, new Float64Array(4)),
  );
}

/** Right answers and examples, under the newest release and under the one before: four whole numbers, those of the release that the
 * bundle does not have being 0; all of them, if it has neither. `task` is that of the round, `examples` are [{ text, target }], and
 * `pause` is awaited before each answer. What is in use stays. Throws TrustError, DataError: the bundle is damaged or breaks a rule. */
async function ownCounts(engine, task, examples, pause) {
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

/** What a person's end of the work throws, which is not the fault of an example. */
class Ended extends Error {}

const ends = (pause, { round }) => async (progress) => {
  try {
    await pause({ round, ...progress });
  } catch (error) {
    throw new Ended(error.message, { cause: error });
  }
};

/** What `attempt` makes of the examples, encoded; what `otherwise` makes, if anything fails. */
async function orElse(attempt, otherwise) {
  try {
    return await attempt();
  } catch (error) {
    if (error instanceof Ended) throw error;
    warn(error);
    return otherwise();
  }
}

const warn = (error) => console.warn("contributed nothing:", error.about || error.name); // an error's text can quote an example

/** The examples whose labels the task has, or all of a language model's, with tokens and target: { train, heldOut }, at most `cap` held
 * out. Those that the base cannot read are left out. */
async function usable({ engine, trainer, task: { labels }, examples }, cap) {
  const target = ({ label }) => (typeof label === "number" ? label : labels.indexOf(label));
  const isKnown = (one) => !labels.length || (one.target >= 0 && one.target < labels.length);
  const known = examples.map((one) => ({ ...one, target: target(one) })).filter(isKnown);
  const encoded = async (one) => {
    try {
      await engine.text.prepare([one.text]);
      return [{ ...one, ...trainer.encode(one) }];
    } catch (error) {
      warn(error);
      return [];
    }
  };
  const found = new Map();
  for (const one of known) found.set(one, await encoded(one));
  const read = (split) => known.filter((one) => one.split === split).flatMap((one) => found.get(one));
  return { train: read("train"), heldOut: read("validation").slice(0, cap) };
}

/** The score of `start` on the held-out examples, and what training on the others makes of it. */
async function outcome({ trainer, task, pause }, start, { train, heldOut }, limits) {
  const score = await scored(trainer, start, heldOut, pause);
  const control = { norm: limits.maximum_gradient_norm, unfailing: true };
  const learnt = async () => {
    const all = await withVariants(trainer, train, task.variants, between(pause));
    const order = batches(all.map(({ ids }) => ids.length), task.batch_size, task.epochs);
    return trainOn(trainer, start, all, task, order, pause, control);
  };
  const trained = await orElse(learnt, () => start);
  return { trained, examples: train.length, score };
}

/** Examples with `count` variants of each that is a picture or a sound. */
async function withVariants(trainer, examples, count, pause) {
  const found = [];
  for (const one of examples) {
    await pause();
    const texts = variants(one.text, count);
    await trainer.engine.text.prepare(texts);
    found.push(one, ...texts.map((text) => ({ ...one, ...trainer.encode({ text }) })));
  }
  return found;
}

/** The score of values; the worst where it cannot be computed. */
async function scored(trainer, values, examples, pause) {
  const found = await orElse(() => trainer.score(values, examples, between(pause)), () => worst(examples));
  return Number.isFinite(found.loss) ? found : worst(examples);
}

/** The score where no answer could be computed: all of them wrong. */
const worst = ({ length }) => ({ correct: 0, loss: MAX_LOSS * length, count: length });

/** `start` trained on examples, as the trainer encodes them, in batches of this order. `pause` is awaited with { step, steps };
 * `control` and errors as of `descend`. */
export async function trainOn(trainer, start, examples, task, order, pause = async () => {}, control = {}) {
  let step = 0;
  const gradientsOf = async (values, batch) => {
    step += 1;
    const rows = trainer.shares(batch.map((i) => examples[i]));
    return trainer.gradients(values, rows, () => pause({ step, steps: order.length }));
  };
  const trained = [...start.keys()].filter((name) => task.trained.includes(partOf(name)));
  return descend(start, order, gradientsOf, task, trained, control);
}

/** The update of the shared tensors as one vector, in peft's order and shapes. */
function update(start, trained, shared, inputs) {
  const parts = shared.map((name) => {
    const [before, after] = [start, trained].map((of) => toPeft(name, { ...inputs.get(name), values: of.get(name) }).values);
    return Float64Array.from(after, (value, i) => value - before[i]);
  });
  const whole = new Float64Array(parts.reduce((size, part) => size + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}
