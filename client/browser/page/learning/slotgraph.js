// A training graph with an adapter in its slots, as client/training/slotgraph.py. trainer.js trains a classifier with it,
// languagegraph.js a language model.
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

const GRADIENT = ".gradient"; // ends the name of the output that holds the gradient by a slot
export const TOKENS_AT_ONCE = 512; // of one run of the training graph, which bounds its memory

export class SlotGraph {
  static head = []; // graph inputs that every adapter fills
  #factors; // of Fed-SB

  /** Use `open`. */
  constructor(engine, session, shapes, scaling) {
    Object.assign(this, { engine, session, shapes, scaling });
  }

  /** Throws ConfigError: the base has slots that are not trained. */
  static checkBase(_base) {}

  /**
   * Load the training graph of an open bundle, for the adapter { manifest, inputs }.
   *
   * Throws ConfigError: the bundle has none, or it lacks a gradient; or the base or the method of the adapter is one that
   * cannot be trained here. DataError: the adapter is of another layout than its method says; or as `Trust.file`.
   */
  static async open(engine, adapter) {
    const { base } = engine;
    const { scaling, shapes } = this.checked(base, adapter);
    const { trainer } = await engine.training((session) => {
      const lacking = Object.keys(base.slots).sort(byCodePoint).find((name) => !session.outputNames.includes(name + GRADIENT));
      if (lacking !== undefined) {
        throw new ConfigError(`the training graph has no gradient of ${quoted(lacking)}: export the base again`, TRAINING);
      }
      const trainer = new this(engine, session, shapes, scaling);
      return { session, trainer, probe: () => trainer.probe(adapter.inputs) };
    });
    return trainer;
  }

  /** The loss and the gradients of fixed examples at an adapter's graph inputs: arrays of numbers, as `choose` takes them. */
  async probe(inputs) {
    const { loss, gradients } = await this.gradients(this.valuesOf(inputs), this.probes(), async () => {});
    return [[loss], ...gradients.values()];
  }

  /** The factors and the shapes of an adapter. Throws as `open`. */
  static checked(base, { manifest, inputs }) {
    if (!Object.hasOwn(base.files, TRAINING)) {
      throw new ConfigError("the base has no training graph: export it with 'export base --training'", TRAINING);
    }
    this.checkBase(base);
    const scaling = scalings(base, manifest);
    return { scaling, shapes: checkedShapes(inputs, scaling, this.head, manifest) };
  }

  /** Free the memory of the training graph. */
  async close() {
    await this.session?.release();
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
   * The loss of batches, which are graph inputs besides the slots, and the gradient by each value: { loss, gradients,
   * outputs }, the last of each run, without its gradients. `pause` is awaited before each run of the graph; what it throws
   * ends the computation. `values` may have R of Fed-SB. Throws DataError: the graph does not run.
   */
  async summed(values, batches, pause) {
    const factors = hasSquares(values) ? (this.#factors ??= await frozenFactors(this.shapes)) : new Map();
    const feeds = runtime.adapterFeeds(this.inputsOf(folded(values, factors)));
    const sums = new Map([...this.shapes.keys()].map((name) => [name, new Float32Array(values.get(name).length)]));
    const outputs = [];
    let loss = 0;
    for (const batch of batches) {
      await pause();
      const found = await this.#run({ ...batch, ...feeds });
      loss += found.loss.data[0];
      for (const [name, sum] of sums) {
        const gradient = found[name + GRADIENT].data;
        for (let i = 0; i < sum.length; i++) sum[i] += gradient[i];
      }
      outputs.push(Object.fromEntries(Object.entries(found).filter(([name]) => !name.endsWith(GRADIENT))));
    }
    const gradients = new Map([...sums].map(([name, sum]) => [name, scaled(sum, this.#factor(name))]));
    return { loss, gradients: new Map([...gradients, ...squareGradients(gradients, factors)]), outputs };
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
function checkedShapes(inputs, scaling, head, { name, peft_config: { r } }) {
  const trained = new Set([...head, ...[...scaling.keys()].flatMap((path) => [path + LORA_A, path + LORA_B])]);
  const given = [...inputs].filter(([, { values }]) => values.length).map(([slot]) => slot);
  const odd = given.find((slot) => !trained.has(slot)) ?? [...trained].find((slot) => !fits(slot, inputs.get(slot)?.shape, r));
  if (odd === undefined) return new Map([...trained].sort(byCodePoint).map((slot) => [slot, inputs.get(slot).shape]));
  throw new DataError(`adapter ${quoted(name)} has not the tensor ${quoted(odd)} that its PEFT config says: export it again`, odd);
}

const fits = (slot, shape, rank) =>
  shape !== undefined && (slot.endsWith(LORA_A) ? shape[1] === rank : slot.endsWith(LORA_B) ? shape[0] === rank : shape[0] > 0);
