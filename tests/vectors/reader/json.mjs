// JSON with one meaning (docs/reference/bundle-format.md, "JSON"): read strictly, and written in the canonical form.
//
// Objects become Maps, integers BigInts and other numbers Numbers, so that nothing of the text is lost.

const MAX_DEPTH = 16; // objects and arrays within each other
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const SPACE = /[ \t\n\r]*/y;
const STRING = /"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y;
const NUMBER = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const WORDS = new Map([["true", true], ["false", false], ["null", null]]);
const WORD = /true|false|null/y;

/** The value of a JSON text in UTF-8. Throws SyntaxError or TypeError for any other bytes. */
export function parse(bytes) {
  const reader = new Reader(UTF8.decode(bytes));
  const value = reader.value(0);
  reader.end();
  return value;
}

class Reader {
  constructor(text) {
    [this.text, this.at] = [text, 0];
  }

  value(depth) {
    this.take(SPACE);
    const sign = this.text[this.at];
    if (sign === "{") return this.#object(depth + 1);
    if (sign === "[") return this.#array(depth + 1);
    if (sign === '"') return this.#string();
    const word = this.take(WORD);
    return word ? WORDS.get(word[0]) : this.#number();
  }

  end() {
    this.take(SPACE);
    if (this.at !== this.text.length) throw new SyntaxError("something follows the value");
  }

  /** What `pattern` matches here, or null. */
  take(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (found) this.at = pattern.lastIndex;
    return found;
  }

  #object(depth) {
    const found = new Map();
    this.#list(depth, "}", () => {
      this.take(SPACE);
      const key = this.#string();
      this.take(SPACE);
      if (this.text[this.at++] !== ":") throw new SyntaxError("a colon is missing");
      if (found.has(key)) throw new SyntaxError("a key occurs twice");
      found.set(key, this.value(depth));
    });
    return found;
  }

  #array(depth) {
    const found = [];
    this.#list(depth, "]", () => found.push(this.value(depth)));
    return found;
  }

  #list(depth, close, element) {
    if (depth > MAX_DEPTH) throw new SyntaxError("nested too deeply");
    this.at += 1;
    this.take(SPACE);
    if (this.text[this.at] === close) {
      this.at += 1;
      return;
    }
    for (;;) {
      element();
      this.take(SPACE);
      const sign = this.text[this.at++];
      if (sign === close) return;
      if (sign !== ",") throw new SyntaxError("a comma is missing");
    }
  }

  #string() {
    const found = this.take(STRING);
    if (!found) throw new SyntaxError("a text is missing");
    const text = JSON.parse(found[0]);
    if (/\p{Surrogate}/u.test(text)) throw new SyntaxError("half of a surrogate pair");
    return text;
  }

  #number() {
    const found = this.take(NUMBER);
    if (!found) throw new SyntaxError("not a value");
    if (found[1] === undefined && found[2] === undefined) return BigInt(found[0]);
    const value = Number(found[0]);
    if (!Number.isFinite(value)) throw new SyntaxError("a number is too large");
    return value;
  }
}

/** The canonical text of a value as `parse` returns it. */
export function canonical(value) {
  if (typeof value === "bigint") return String(value);
  if (typeof value === "number") return double(value);
  if (Array.isArray(value)) return `[${value.map(canonical).join()}]`;
  if (!(value instanceof Map)) return JSON.stringify(value); // text, true, false, null
  const keys = [...value.keys()].sort(byCodePoint);
  return `{${keys.map((key) => `${JSON.stringify(key)}:${canonical(value.get(key))}`).join()}}`;
}

/** A double with the fewest digits. */
function double(value) {
  const [, sign, first, rest = "", exponent] = /^(-?)(\d)(?:\.(\d+))?e([+-]\d+)$/.exec(value.toExponential());
  const [digits, power] = [first + rest, Number(exponent)];
  if (power < -4 || power > 15) {
    const size = String(Math.abs(power)).padStart(2, "0");
    return `${sign}${first}${rest && `.${rest}`}e${power < 0 ? "-" : "+"}${size}`;
  }
  if (power < 0) return `${sign}0.${"0".repeat(-power - 1)}${digits}`;
  const whole = digits.padEnd(power + 1, "0");
  return `${sign}${whole.slice(0, power + 1)}.${whole.slice(power + 1) || "0"}`;
}

export const byCodePoint = (left, right) => Buffer.compare(Buffer.from(left), Buffer.from(right));
