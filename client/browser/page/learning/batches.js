// The order of a device's examples in training, as client/training/batches.py. The order is drawn here from the browser's
// entropy: NumPy does not promise to keep the stream of its generator, from which a native device draws it.

/** The batches of all epochs, as lists of indices: texts of similar length, which need little padding, in random order. `lengths` are
 * tokens of each text; `permuted` draws an order, n → a permutation of 0 to n - 1. Guarantee: an epoch contains every index exactly
 * once. */
export function batches(lengths, size, epochs, permuted = permutation) {
  const epoch = () => {
    const grouped = permuted(lengths.length).sort((left, right) => lengths[left] - lengths[right]); // which is stable
    const all = Array.from({ length: Math.ceil(grouped.length / size) }, (_, i) => grouped.slice(i * size, (i + 1) * size));
    return permuted(all.length).map((i) => all[i]);
  };
  return Array.from({ length: epochs }, epoch).flat();
}

/** The texts of a batch, given by their lengths, in runs of at most `tokens` tokens with padding, each of one or more. */
export function parts(lengths, tokens) {
  const found = [];
  let longest = 0;
  for (const [i, length] of lengths.entries()) {
    longest = Math.max(longest, length);
    const run = found.at(-1);
    if (run && longest * (run.length + 1) <= tokens) {
      run.push(i);
    } else {
      found.push([i]);
      longest = length;
    }
  }
  return found;
}

/** A random permutation of 0 to n - 1 (Fisher and Yates), each as likely as any other. */
export function permutation(n) {
  const found = Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const other = below(i + 1);
    [found[i], found[other]] = [found[other], found[i]];
  }
  return found;
}

/** A random whole number below n, which is at most 2^32. */
function below(n) {
  const most = 2 ** 32 - (2 ** 32 % n);
  for (;;) {
    const [drawn] = crypto.getRandomValues(new Uint32Array(1));
    if (drawn < most) return drawn % n;
  }
}
