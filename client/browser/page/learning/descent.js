// AdamW, as client/training/descent.py: equal gradients give equal adapters, up to rounding.

const [BETA_1, BETA_2, EPSILON] = [0.9, 0.999, 1e-8];

/** Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2). The moments are in double precision. */
export class AdamW {
  #steps = 0;
  #moments = new Map(); // name → [first, second]

  constructor(learningRate, weightDecay = 0) {
    Object.assign(this, { learningRate, weightDecay });
  }

  /** Change each parameter that has a gradient, in place. Both are Maps of name → Float32Array, of equal lengths. */
  step(parameters, gradients) {
    this.#steps += 1;
    const [bias1, bias2] = [1 - BETA_1 ** this.#steps, 1 - BETA_2 ** this.#steps];
    const kept = Math.fround(1 - this.learningRate * this.weightDecay);
    for (const [name, gradient] of gradients) {
      const values = parameters.get(name);
      const [first, second] = this.#momentsOf(name, gradient.length);
      gradient.forEach((g, i) => {
        first[i] = BETA_1 * first[i] + (1 - BETA_1) * g;
        second[i] = BETA_2 * second[i] + (1 - BETA_2) * g ** 2;
        const change = first[i] / bias1 / (Math.sqrt(second[i] / bias2) + EPSILON);
        values[i] = Math.fround(values[i] * kept) - this.learningRate * change;
      });
    }
  }

  #momentsOf(name, size) {
    if (!this.#moments.has(name)) this.#moments.set(name, [new Float64Array(size), new Float64Array(size)]);
    return this.#moments.get(name);
  }
}
