// The hidden states of texts below all slots, as edgeadapt/bases/states.py: what the training graph of a base reads whose last layers alone
// have slots. No adapter changes them, so each text's are computed once.

import * as runtime from "../runtime.js";

const MAX_BYTES = 2 ** 26; // in memory

export class States {
  #kept = new Map(); // tokens → Float32Array, the last used ones last
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
    let values, width;
    for (let row = 0; row < count; row++) {
      const own = Array.from(ids.data.subarray(row * longest, (row + 1) * longest), Number);
      const tokens = own.filter((_, i) => mask.data[row * longest + i]);
      const states = await this.#of(tokens);
      width ??= states.length / tokens.length;
      values ??= new Float32Array(count * longest * width);
      values.set(states, row * longest * width);
    }
    const read = { ...batch, [runtime.STATES]: runtime.floats(values, [count, longest, width]) };
    return Object.fromEntries(Object.entries(read).filter(([name]) => this.inputNames.includes(name)));
  }

  /** The states of a text: alone, because in a batch they would depend, by rounding, on the other texts. */
  async #of(tokens) {
    const key = tokens.join();
    let states = this.#kept.get(key);
    if (states) this.#kept.delete(key);
    else {
      const found = await runtime.run(this.lower, runtime.padded([tokens]));
      states = found[runtime.STATES].data;
      this.#size += states.byteLength;
    }
    this.#kept.set(key, states);
    for (const [oldest, { byteLength }] of this.#kept) {
      if (this.#size <= MAX_BYTES) break;
      this.#kept.delete(oldest);
      this.#size -= byteLength;
    }
    return states;
  }
}
