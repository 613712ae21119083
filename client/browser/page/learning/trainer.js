// Gradients and logits of a classifier's adapter from the graphs of its bundle, as client/training/graphtrainer.py.
//
// An adapter that is trained is a Map of graph input → Float32Array. B is divided by the scaling that the input contains:
// these are the numbers of peft, which the optimizer steps. peft's matrices are the transposed ones, which makes no
// difference to it.

import { byCodePoint } from "../bytes.js";
import { ConfigError, DataError, EdgeAdaptError, quoted } from "../errors.js";
import { LORA_A, LORA_B } from "../graphinputs.js";
import * as runtime from "../runtime.js";
import { TRAINING } from "../trust.js";
import { folded, frozenFactors, hasSquares, squareGradients } from "./fedsb.js";

const ENCODER = "encoder."; // begins the path of everything below the head
const HEAD = ["classifier.bias", "classifier.weight"]; // over the mean of the tokens, as federations train it
const GRADIENT = ".gradient"; // ends the name of the output that holds the gradient by a slot
const MAX_TOKENS = 128; // of a text
const TOKENS_AT_ONCE = 512; // of one run of the training graph, which bounds its memory
const MAX_ROWS = 16; // of one run of the answering graph

export class GraphTrainer {
  #factors; // of Fed-SB

  /** Use `open`. */
  constructor(engine, session, shapes, scaling) {
    Object.assign(this, { engine, session, shapes, scaling });
  }

  /**
   * Load the training graph of an open bundle, for the adapter { manifest, inputs }.
   *
   * Throws ConfigError: the bundle has none, or it lacks a gradient; or the base or the method of the adapter is one that
   * cannot be trained here. DataError: the adapter is of another layout than its method says; or as `Trust.file`.
   */
  static async open(engine, adapter) {
    const { base } = engine;
    const { scaling, shapes } = checked(base, adapter);
    const session = await engine.trainingSession();
    const lacking = Object.keys(base.slots).sort(byCodePoint).find((name) => !session.outputNames.includes(name + GRADIENT));
    if (lacking === undefined) return new GraphTrainer(engine, session, shapes, scaling);
    await session.release();
    throw new ConfigError(`the training graph has no gradient of ${quoted(lacking)}: export the base again`, TRAINING);
  }

  /** As `open`, without the training graph: what answers and embeds, and has no gradients. Throws as `open`. */
  static answering(engine, adapter) {
    const { scaling, shapes } = checked(engine.base, adapter);
    return new GraphTrainer(engine, null, shapes, scaling);
  }

  /** Free the memory of the training graph. */
  async close() {
    await this.session?.release();
  }

  /** The tokens of a text. Throws DataError as `Text.tokens`. */
  tokens(text) {
    return this.engine.text.tokens(text, MAX_TOKENS);
  }

  /** The values to train, from an adapter's graph inputs. */
  valuesOf(inputs) {
    return new Map([...this.shapes.keys()].map((name) => [name, scaled(inputs.get(name).values, 1 / this.#factor(name))]));
  }

  /** The graph inputs, one for each slot, of values: `valuesOf(inputsOf(values))` are the values, rounded. */
  inputsOf(values) {
    const inputs = runtime.emptyAdapter(this.engine.base.slots);
    for (const [name, shape] of this.shapes) {
      inputs.set(name, { shape, values: scaled(values.get(name), this.#factor(name)) });
    }
    return inputs;
  }

  /**
   * The sum of each example's cross-entropy in nats times its share, and the gradient by each value: { loss, gradients }.
   *
   * `values` may have R of Fed-SB. `examples` are [{ ids, target, share }]: tokens, the number of the label, and the factor in the loss. `pause` is awaited
   * before each run of the graph; what it throws ends the computation. Throws DataError: the graph does not run.
   */
  async gradients(values, examples, pause) {
    const factors = hasSquares(values) ? (this.#factors ??= await frozenFactors(this.shapes)) : new Map();
    const feeds = runtime.adapterFeeds(this.inputsOf(folded(values, factors)));
    const sums = new Map([...this.shapes.keys()].map((name) => [name, new Float32Array(values.get(name).length)]));
    let loss = 0;
    for (const part of parts(byLength(examples))) {
      await pause();
      const found = await this.#run({ ...runtime.padded(part.map(({ ids }) => ids)), ...targets(part), ...feeds });
      loss += found.loss.data[0];
      for (const [name, sum] of sums) {
        const gradient = found[name + GRADIENT].data;
        for (let i = 0; i < sum.length; i++) sum[i] += gradient[i];
      }
    }
    const gradients = new Map([...sums].map(([name, sum]) => [name, scaled(sum, this.#factor(name))]));
    return { loss, gradients: new Map([...gradients, ...squareGradients(gradients, factors)]) };
  }

  /** The logits of texts, given as tokens: a Float32Array for each. `pause` as in `gradients`. */
  logits(values, tokens, pause) {
    return this.#answers(this.inputsOf(values), tokens, pause);
  }

  /** The embeddings of texts, as `logits`: the logits of a head that is the identity. */
  embeddings(values, tokens, pause) {
    const inputs = this.inputsOf(values);
    const [bias, weight] = HEAD;
    const { hidden } = this;
    const identity = Float32Array.from({ length: hidden ** 2 }, (_, i) => Number(i % (hidden + 1) === 0));
    inputs.set(bias, { shape: [hidden], values: new Float32Array(hidden) });
    return this.#answers(inputs.set(weight, { shape: [hidden, hidden], values: identity }), tokens, pause);
  }

  /** Numbers of an embedding. */
  get hidden() {
    const [bias, weight] = HEAD.map((name) => this.shapes.get(name).reduce((product, size) => product * size, 1));
    return weight / bias;
  }

  async #answers(inputs, tokens, pause) {
    const feeds = runtime.adapterFeeds(inputs);
    const order = byLength(tokens.map((ids, at) => ({ ids, at })));
    const rows = this.engine.base.independent_rows ? MAX_ROWS : 1;
    const found = [];
    for (let start = 0; start < order.length; start += rows) {
      await pause();
      const run = order.slice(start, start + rows);
      const { logits } = await runtime.run(this.engine.session, { ...runtime.padded(run.map(({ ids }) => ids)), ...feeds });
      const width = logits.dims[1];
      run.forEach(({ at }, i) => (found[at] = logits.data.slice(i * width, (i + 1) * width)));
    }
    return found;
  }

  async #run(feeds) {
    try {
      return await runtime.run(this.session, feeds);
    } catch (error) {
      if (!(error instanceof EdgeAdaptError)) throw error;
      throw new DataError(`the training graph does not run: ${error.message}`, TRAINING);
    }
  }

  #factor(name) {
    return name.endsWith(LORA_B) ? this.scaling.get(name.slice(0, -LORA_B.length)) : 1;
  }
}

/** Each number times the factor, rounded to float32. */
const scaled = (values, factor) => Float32Array.from(values, (value) => value * Math.fround(factor));

const byLength = (examples) => examples.toSorted((left, right) => left.ids.length - right.ids.length);

const targets = (part) => ({
  targets: runtime.int64(part.map(({ target }) => target), [part.length]),
  shares: runtime.floats(Float32Array.from(part, ({ share }) => share), [part.length]),
});

/** Examples, the shortest first, in runs of at most `TOKENS_AT_ONCE` tokens with padding, each of one or more. */
export function parts(examples) {
  const found = [];
  for (const example of examples) {
    const last = found.at(-1);
    if (last && example.ids.length * (last.length + 1) <= TOKENS_AT_ONCE) last.push(example);
    else found.push([example]);
  }
  return found;
}

/** The factors and the shapes of an adapter. Throws as `GraphTrainer.open`. */
function checked(base, { manifest, inputs }) {
  checkBase(base);
  const scaling = scalings(base, manifest);
  return { scaling, shapes: checkedShapes(inputs, scaling, manifest) };
}

function checkBase({ files, slots }) {
  if (!Object.hasOwn(files, TRAINING)) {
    throw new ConfigError("the base has no training graph: export it with 'export base --training'", TRAINING);
  }
  const isTrained = (name) => HEAD.includes(name) || (name.startsWith(ENCODER) && isLora(name));
  const odd = [...Object.keys(slots).filter((name) => !isTrained(name)), ...HEAD.filter((name) => !Object.hasOwn(slots, name))];
  if (!odd.length) return;
  const [first] = odd.sort(byCodePoint);
  const remedy = "export it with --head mean and low-rank slots";
  throw new ConfigError(`the base has a slot ${quoted(first)}, which federations do not train: ${remedy}`, first);
}

const isLora = (name) => name.endsWith(LORA_A) || name.endsWith(LORA_B);

/** The factor of each adapted layer: Map of path → number. */
function scalings({ slots }, { name, peft_config: config }) {
  const refuse = (why) => {
    throw new ConfigError(`adapter ${quoted(name)} ${why}`, "adapter-manifest.peft_config");
  };
  if (!config) refuse("does not state its PEFT config, which training needs: export it again");
  if (config.peft_type !== "LORA" || config.use_dora) refuse("is of a method that the page does not train: use plain LoRA");
  // A pattern is a regular expression, which could take forever.
  if (config.rank_pattern.length || config.alpha_pattern.length) refuse("has ranks by pattern, which the page does not train");
  if (config.r < 1) refuse("has rank 0: export it again");
  const scaling = config.lora_alpha / (config.use_rslora ? Math.sqrt(config.r) : config.r);
  if (!(scaling > 0)) refuse("has an alpha of 0, with which nothing is learned");
  const layers = Object.keys(slots).filter((slot) => slot.endsWith(LORA_A)).map((slot) => slot.slice(0, -LORA_A.length));
  const targeted = (path) => config.target_modules.some((target) => path === target || path.endsWith(`.${target}`));
  return new Map(layers.filter(targeted).map((path) => [path, scaling]));
}

/** The shape of each tensor that is trained, by graph input. Throws DataError: the adapter has others. */
function checkedShapes(inputs, scaling, { name, peft_config: { r } }) {
  const trained = new Set([...HEAD, ...[...scaling.keys()].flatMap((path) => [path + LORA_A, path + LORA_B])]);
  const given = [...inputs].filter(([, { values }]) => values.length).map(([slot]) => slot);
  const odd = given.find((slot) => !trained.has(slot)) ?? [...trained].find((slot) => !fits(slot, inputs.get(slot)?.shape, r));
  if (odd === undefined) return new Map([...trained].sort(byCodePoint).map((slot) => [slot, inputs.get(slot).shape]));
  throw new DataError(`adapter ${quoted(name)} has not the tensor ${quoted(odd)} that its PEFT config says: export it again`, odd);
}

const fits = (slot, shape, rank) =>
  shape !== undefined && (slot.endsWith(LORA_A) ? shape[1] === rank : slot.endsWith(LORA_B) ? shape[0] === rank : shape[0] > 0);
