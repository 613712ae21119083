// Fed-SB, as edgeadapt/methods/lorasb.py: in a round a layer computes W x + scaling · (B + F R) A x, where F is a frozen matrix that
// everybody can compute, and R, which is zero at first, is all that is trained of the layer. R is a Float32Array of rank × rank numbers,
// row by row as peft has matrices; B here is that of a graph input: [rank, outputs], the transposed one of peft.

import { keystream, streamKey } from "../aggregation/masks.js";
import { byCodePoint, digest, encode as utf8 } from "../bytes.js";
import { DataError, quoted } from "../errors.js";
import { LORA_B, PEFT_PREFIX } from "../graphinputs.js";

const LORA_R = ".lora_R.weight";

const squareName = (name) => name.replace(LORA_B, LORA_R);

/** The values, with R = 0 of each LoRA layer, in peft's order. `shapes`: of each graph input. Throws DataError: a rank is above the
 * outputs of its layer, where R would be larger than B. */
export function unfolded(values, shapes) {
  const squares = layers(shapes).map(([name, [rank, outputs]]) => {
    if (rank > outputs) throw new DataError(`${quoted(name)} has rank ${rank}, above its ${outputs} outputs: Fed-SB needs a lower one`, name);
    return [squareName(name), new Float32Array(rank * rank)];
  });
  return new Map([...values, ...squares].sort(([left], [right]) => byCodePoint(left, right)));
}

export const hasSquares = (values) => [...values.keys()].some((name) => name.endsWith(LORA_R));

/** F of each LoRA layer, by the name of its B: Map of name → { rank, outputs, values }, row by row of [outputs, rank]. */
export async function frozenFactors(shapes) {
  const found = new Map();
  for (const [name, [rank, outputs]] of layers(shapes)) {
    const seed = await digest(utf8(`edgeadapt/fed-sb/1\0${PEFT_PREFIX}${name} ${outputs} ${rank}`));
    const key = await streamKey(seed);
    const size = Math.fround(1 / Math.sqrt(rank)); // random signs over the root of the rank
    const values = Float32Array.from(await keystream(key, 0, outputs * rank), (byte) => (byte & 1 ? size : -size));
    found.set(name, { rank, outputs, values });
  }
  return found;
}

const layers = (shapes) => [...shapes].filter(([name]) => name.endsWith(LORA_B));

export function folded(values, factors) {
  const found = new Map(values);
  for (const [name, { rank, outputs, values: f }] of factors) {
    const [square, before] = [values.get(squareName(name)), values.get(name)];
    found.delete(squareName(name));
    const after = Float32Array.from(before, (x, at) => {
      const [column, output] = [Math.floor(at / outputs), at % outputs];
      let sum = x;
      for (let i = 0; i < rank; i++) sum += f[output * rank + i] * square[i * rank + column];
      return sum;
    });
    found.set(name, after);
  }
  return found;
}

/** The gradients by each R, Fᵀ times that by B, from the gradients by B of `folded` values. */
export function squareGradients(gradients, factors) {
  return [...factors].map(([name, { rank, outputs, values: f }]) => {
    const byB = gradients.get(name);
    const found = Float32Array.from({ length: rank * rank }, (_, at) => {
      const [row, column] = [Math.floor(at / rank), at % rank];
      let sum = 0;
      for (let output = 0; output < outputs; output++) sum += f[output * rank + row] * byB[column * outputs + output];
      return sum;
    });
    return [squareName(name), found];
  });
}
