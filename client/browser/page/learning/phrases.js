// Public phrases with their labels, one pair a line, as edgeadapt/formats/phrases.py.

import { decode } from "../bytes.js";
import { DataError, translated } from "../errors.js";
import { stripped } from "../text.js";

const LONGEST_LIST = 2 ** 24; // bytes
const LINES = /\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/; // as Python's str.splitlines

/** The pairs in the bytes of a file: [{ label, text }]. Throws DataError: it is too long, or not UTF-8, or a line has no tab, or nothing
 * on one side of it. The message names the line. */
export function parsePhrases(bytes, name) {
  if (bytes.length > LONGEST_LIST) {
    const reason = `${name} has ${bytes.length} bytes, above the limit of ${LONGEST_LIST}: use a bundle with fewer phrases`;
    throw new DataError(reason, name);
  }
  const text = translated(() => decode(bytes), () => new DataError(`${name} is not UTF-8`, name));
  return text.split(LINES).filter(stripped).map((line, i) => {
    const tab = line.indexOf("\t");
    const [label, phrase] = tab < 0 ? ["", ""] : [stripped(line.slice(0, tab)), stripped(line.slice(tab + 1))];
    if (!label || !phrase) throw new DataError(`phrase ${i + 1} of ${name} has not the form LABEL TAB PHRASE`, name);
    return { label, text: phrase };
  });
}
