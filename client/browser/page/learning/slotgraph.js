// A training graph with an adapter in its slots, as client/training/slotgraph.py. trainer.js trains a classifier with it, languagegraph.js
// a language model. An adapter that is trained is a Map of graph input → Float32Array. B is divided by the scaling that the input contains:
// these are the numbers of peft, which the optimizer steps. peft's matrices are the transposed ones, which makes no difference to it. An
// adapter of DoRA has magnitudes (dora.js).

import { byCodePoint } from "../bytes.js";
import { ConfigError, DataError, EdgeAdaptError, quoted } from "../errors.js";
import { LORA_A, LORA_B, OFFSET, OUTPUT_SCALE, bottleneckEndings, hasColumns, hasRows } from "../graphinputs.js";
import * as runtime from "../runtime.js";
import { TRAINING } from "../trust.js";
import { MAGNITUDE, asValues, gradientsOfMagnitudes, magnitudes, withMagnitudes, withScales } from "./dora.js";
import { folded, frozenFactors, hasSquares, squareGradients } from "./fedsb.js";

const LAYER = /^.*\.[^.]*\.(\d{1,9})\./; // as peft reads the number of the layer that a module is in
const GRADIENT = ".gradient"; // ends the name of the output that holds the gradient by a slot
// End the names of outputs of a layer that has slots for DoRA: the norm of each output's weights with the update, and its own bias.
const [WEIGHT_NORM, OWN_BIAS] = [".weight_norm", ".own_bias"];
export const TOKENS_AT_ONCE = 512; // of one run of the training graph, which bounds its memory

export class SlotGraph {
  static scores = []; // outputs of the training graph, besides the loss and the gradients, that are read
  #factors; // of Fed-SB
  #biases = new Map(); // of the layers of DoRA that have one

  constructor(engine, session, shapes, scaling) {
    Object.assign(this, { engine, session, shapes, scaling, states: session && new States(session) });
  }

  static head(_base) {
    return [];
  }

  /** Load the training graph of an open bundle, for the adapter { manifest, inputs }: inputs of slots or, with `start`, tensors of
   * values, which are `start`. Throws ConfigError: the bundle has none, or it lacks an output; or the method of the adapter is one that
   * cannot be trained here. DataError: the adapter is of another layout than its method says; or as `Trust.file`. */
  static async open(engine, adapter, start = null) {
    const { base } = engine;
    const { scaling, shapes } = this.checked(base, adapter);
    const { trainer } = await engine.training(async (session) => {
      const lacking = Object.keys(base.slots).sort(byCodePoint).find((name) => !session.outputNames.includes(name + GRADIENT));
      if (lacking !== undefined) {
        throw new ConfigError(`the training graph has no gradient of ${quoted(lacking)}: export the base again`, TRAINING);
      }
      const trainer = new this(engine, session, shapes, scaling);
      await trainer.#prepareDora();
      return { session, trainer, probe: async () => trainer.probe(start ?? (await trainer.valuesOf(adapter.inputs))) };
    });
    return trainer;
  }

  /** Loss and gradients of fixed examples at these values: arrays as `choose` takes them. */
  async probe(values) {
    const { loss, gradients } = await this.gradients(values, this.probes(), async () => {});
    return [[loss], ...gradients.values()];
  }

  /** The factors and the shapes of an adapter. Throws as `open`. */
  static checked(base, { manifest, inputs }) {
    if (!Object.hasOwn(base.files, TRAINING)) {
      throw new ConfigError("the base has no training graph: export it with 'bundle make --training'", TRAINING);
    }
    const scaling = scalings(base, manifest);
    return { scaling, shapes: checkedShapes(inputs, scaling, this.head(base), manifest) };
  }

  /** Read what the slots of DoRA need. Throws ConfigError: the base or its training graph was not made for that. */
  async #prepareDora() {
    const layers = magnitudes(this.shapes);
    const has = (path, ending) => this.session.outputNames.includes(path + ending);
    const biased = layers.filter((path) => has(path, OWN_BIAS));
    const needed = [...layers.map((path) => path + OUTPUT_SCALE), ...biased.map((path) => path + OFFSET)];
    const missing = needed.find((name) => !Object.hasOwn(this.engine.base.slots, name));
    if (missing) {
      const remedy = "export it with --slots low-rank,scale,offset";
      throw new ConfigError(`the base has no slot ${quoted(missing)}, which DoRA needs: ${remedy}`, missing);
    }
    const odd = layers.find((path) => !has(path, WEIGHT_NORM));
    if (odd) throw new ConfigError(`the training graph has no norm of ${quoted(odd)}: export the base again`, TRAINING);
    if (biased.length) this.#biases = await this.#ofLayers(biased, OWN_BIAS);
  }

  async close() {
    await this.session?.release();
  }

  /** The values to train, from an adapter's graph inputs. Throws as `inputsOf`. */
  async valuesOf(inputs) {
    const given = new Map([...this.#filled()].map(([name]) => [name, scaled(inputs.get(name).values, 1 / this.#factor(name))]));
    return withMagnitudes(given, (values, layers) => this.#norms(values, layers));
  }

  /** The graph inputs, one for each slot, of values: `valuesOf(inputsOf(values))` are the values, rounded. Throws DataError: the
   * training graph does not run, or with the adapter an output of a layer has no weights. */
  async inputsOf(values) {
    return this.#inputs(values, await this.#norms(values, magnitudes(values)));
  }

  #inputs(values, norms) {
    const [inputs, slots] = [runtime.emptyAdapter(this.engine.base.slots), withScales(values, norms, this.#biases)];
    for (const [name, shape] of this.#filled()) {
      inputs.set(name, { shape, values: scaled(slots.get(name), this.#factor(name)) });
    }
    return inputs;
  }

  /** The slots that an adapter fills, and their shapes: Map of name → shape. */
  #filled() {
    const slots = ([name, shape]) => {
      if (!name.endsWith(MAGNITUDE)) return [[name, shape]];
      const path = name.slice(0, -MAGNITUDE.length);
      return [OUTPUT_SCALE, ...(this.#biases.has(path) ? [OFFSET] : [])].map((ending) => [path + ending, [1, ...shape]]);
    };
    return new Map([...this.shapes].flatMap(slots));
  }

  /** ‖W + s B A‖ of each output of layers: Map of path → Float32Array. Throws as `inputsOf`. */
  async #norms(values, layers) {
    if (!layers.length) return new Map();
    const pair = (name) => [name, { shape: this.shapes.get(name), values: scaled(values.get(name), this.#factor(name)) }];
    const pairs = new Map(layers.flatMap((path) => [path + LORA_A, path + LORA_B]).map(pair));
    const norms = await this.#ofLayers(layers, WEIGHT_NORM, runtime.adapterFeeds(pairs));
    const odd = layers.find((path) => !norms.get(path).every((norm) => norm > 0));
    if (odd) throw new DataError(`${quoted(odd)}: with this adapter, an output of the layer has no weights`, odd);
    return norms;
  }

  /** Outputs of layers that depend on no text; ONNX Runtime wants all inputs all the same. */
  async #ofLayers(layers, ending, feeds = {}) {
    const outputs = layers.map((path) => path + ending);
    const found = await this.#run(() => ({ ...runtime.zeroFeeds(this.session), ...feeds }), outputs);
    return new Map(layers.map((path) => [path, found[path + ending].data]));
  }

  /** The loss of batches, which are graph inputs besides the slots, and the gradient by each value: { loss, gradients, outputs }, the
   * last of each run, of which those in `scores`. `pause` is awaited before each run of the graph; what it throws ends the computation.
   * `values` may have R of Fed-SB. Throws as `inputsOf`. */
  async summed(values, batches, pause) {
    const factors = hasSquares(values) ? (this.#factors ??= await frozenFactors(this.shapes)) : new Map();
    const whole = folded(values, factors);
    const norms = await this.#norms(whole, magnitudes(whole));
    const inputs = this.#inputs(whole, norms);
    const feeds = runtime.adapterFeeds(inputs);
    const sums = new Map([...this.#filled().keys()].map((name) => [name, new Float32Array(inputs.get(name).values.length)]));
    const { scores } = this.constructor;
    const wanted = ["loss", ...[...sums.keys()].map((name) => name + GRADIENT), ...scores];
    const outputs = [];
    let loss = 0;
    for (const batch of batches) {
      await pause();
      const found = await this.#run(async () => ({ ...(await this.states.inputsOf(batch)), ...feeds }), wanted);
      loss += found.loss.data[0];
      for (const [name, sum] of sums) {
        const gradient = found[name + GRADIENT].data;
        for (let i = 0; i < sum.length; i++) sum[i] += gradient[i];
      }
      outputs.push(Object.fromEntries(scores.map((name) => [name, found[name]])));
    }
    const bySlot = new Map([...sums].map(([name, sum]) => [name, scaled(sum, this.#factor(name))]));
    const gradients = gradientsOfMagnitudes(bySlot, whole, norms, this.#biases);
    return { loss, gradients: new Map([...gradients, ...squareGradients(gradients, factors)]), outputs };
  }

  async #run(feeds, outputs) {
    try {
      return await runtime.run(this.session, await feeds(), outputs);
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
  const endings = bottleneckEndings(config);
  if (config.peft_type !== "LORA" && !endings) refuse("is of a method that the page does not train: use LoRA, DoRA or bottleneck");
  // A pattern is a regular expression, which could take forever.
  if (config.rank_pattern.length || config.alpha_pattern.length) refuse("has ranks by pattern, which the page does not train");
  if (config.r < 1) refuse("has rank 0: export it again");
  const scaling = endings ? 1 : config.lora_alpha / (config.use_rslora ? Math.sqrt(config.r) : config.r);
  if (!(scaling > 0)) refuse("has an alpha of 0, with which nothing is learned");
  const [first] = endings ?? [LORA_A];
  const layers = Object.keys(slots).filter((slot) => slot.endsWith(first)).map((slot) => slot.slice(0, -first.length));
  const { target_modules: targets, layers_to_transform: numbers = [] } = config;
  const inLayers = (path) => !numbers.length || numbers.includes(Number(path.match(LAYER)?.[1]));
  const targeted = (path) => inLayers(path) && targets.some((target) => path === target || path.endsWith(`.${target}`));
  return new Map(layers.filter(targeted).map((path) => [path, scaling]));
}

/** The shape of each tensor that is trained, by its name among values. Throws DataError: the adapter has others. */
function checkedShapes(inputs, scaling, head, { name, peft_config: config }) {
  const { r, use_dora: dora } = config;
  const layers = [...scaling.keys()];
  const kinds = bottleneckEndings(config) ?? [LORA_A, LORA_B, ...(dora ? [MAGNITUDE] : [])];
  const trained = new Set([...head, ...layers.flatMap((path) => kinds.map((kind) => path + kind))]);
  const tensors = dora ? asValues(inputs, layers) : inputs;
  const given = [...tensors].filter(([, { values }]) => values.length).map(([slot]) => slot);
  const odd = given.find((slot) => !trained.has(slot)) ?? [...trained].find((slot) => !fits(slot, tensors.get(slot)?.shape, r));
  if (odd === undefined) return new Map([...trained].sort(byCodePoint).map((slot) => [slot, tensors.get(slot).shape]));
  throw new DataError(`adapter ${quoted(name)} has not the tensor ${quoted(odd)} that its PEFT config says: export it again`, odd);
}

const fits = (slot, shape, rank) =>
  shape !== undefined && (hasColumns(slot) ? shape[1] === rank : hasRows(slot) ? shape[0] === rank : shape[0] > 0);

const MAX_BYTES = 2 ** 26; // in memory

/** The hidden states of texts below all slots, as edgeadapt/bases/states.py: what the training graph of a base reads whose last layers
 * alone have slots. No adapter changes them, so each text's are computed once. */
class States {
  #kept = new Map(); // tokens → { states, places, width }, the last used ones last
  #size = 0; // bytes

  /** For a session of `runtime.openTraining`. */
  constructor({ lower, inputNames }) {
    Object.assign(this, { lower, inputNames });
  }

  /** The inputs that the training graph reads of a batch. Padding of states is 0. Throws DataError as `runtime.run`. */
  async inputsOf(batch) {
    if (!this.lower) return batch;
    const { input_ids: ids, attention_mask: mask } = batch;
    const [count, longest] = ids.dims;
    const found = [];
    for (let row = 0; row < count; row++) {
      const own = Array.from(ids.data.subarray(row * longest, (row + 1) * longest), Number);
      found.push(await this.#of(own.filter((_, i) => mask.data[row * longest + i])));
    }
    const [places, width] = [Math.max(...found.map(({ places }) => places)), found[0].width]; // a place for each token of a text
    const values = new Float32Array(count * places * width);
    found.forEach(({ states }, row) => values.set(states, row * places * width));
    const read = { ...batch, [runtime.STATES]: runtime.floats(values, [count, places, width]) };
    return Object.fromEntries(Object.entries(read).filter(([name]) => this.inputNames.includes(name)));
  }

  /** The states of a text: alone, because in a batch they would depend, by rounding, on the other texts. */
  async #of(tokens) {
    const key = tokens.join();
    let own = this.#kept.get(key);
    if (own) this.#kept.delete(key);
    else {
      const { data, dims } = (await runtime.run(this.lower, runtime.padded([tokens])))[runtime.STATES];
      own = { states: data, places: dims[1], width: dims[2] };
      this.#size += data.byteLength;
    }
    this.#kept.set(key, own);
    for (const [oldest, { states }] of this.#kept) {
      if (this.#size <= MAX_BYTES) break;
      this.#kept.delete(oldest);
      this.#size -= states.byteLength;
    }
    return own;
  }
}
