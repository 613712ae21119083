// The file of examples that a person picks: to take part with, or to compare before and after a lesson.

const MAX_EXAMPLES = 2 ** 26; // bytes of a file
const SPLITS = ["train", "validation", "test"]; // the last one is of simulations

/**
 * The examples in a file, or none without one: JSON lines, [{ text, label, split }], as client/training/examples.py. A label is its number
 * or its name. With `writes`, those of a language model, [{ text, prompt, split }]. Throws Error: the file is too large, or a line is not an
 * example; the message does not quote it.
 */
export async function readExamples(file, writes) {
  if (!file) return [];
  const { name, size } = file;
  if (size > MAX_EXAMPLES) throw new Error(`${name} is above the limit of ${MAX_EXAMPLES} bytes`);
  return (await file.text()).split("\n").flatMap((line, i) => {
    if (!line.trim()) return [];
    let found = null;
    try {
      found = JSON.parse(line);
    } catch {
      // refused below
    }
    const { text, label, prompt = "", split = "train" } = found ?? {};
    const isText = (value) => typeof value === "string" && value.isWellFormed() && [...value].length <= 2000;
    const isLabel = typeof label === "string" || (Number.isInteger(label) && label >= 0);
    if (isText(text) && text.trim() && (writes ? isText(prompt) : isLabel) && SPLITS.includes(split)) {
      return [writes ? { text, prompt, split } : { text, label, split }];
    }
    throw new Error(`line ${i + 1} of ${name} is not an example: {"text": …${writes ? "" : ', "label": …'}}`);
  });
}
