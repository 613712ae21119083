// The one spelling of a JSON value: as Python writes it with sorted keys, without white space, in ASCII.
//
// `read` takes nothing else, so that two different byte strings never pass for the same document (adapters/signed.py).

import { byCodePoint } from "./bytes.js";

const ESCAPED = /["\\]|[^ -~]/g;
const SHORT = { '"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t" };
const STRING = /"(?:[ !#-\[\]-~]|\\(?:["\\bfnrt]|u[0-9a-f]{4}))*"/y;
const INTEGER = /^(?:0|-?[1-9][0-9]*)$/;
const NUMBER = /-?[0-9][0-9.e+-]*/y;
const CONSTANT = /null|true|false/y;
const DEEPEST = 100; // arrays and objects within each other

/** A value without fractions as text. */
export function write(value) {
  if (typeof value === "string") return `"${value.replace(ESCAPED, escape)}"`;
  if (Array.isArray(value)) return `[${value.map(write)}]`;
  if (Number.isSafeInteger(value) || value === null || typeof value === "boolean") return String(value);
  throw new TypeError("not a value of a layout");
}

const escape = (sign) =>
  SHORT[sign] ?? sign.replace(/[^]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** The value that is written as `text`. Throws SyntaxError: no JSON, or not its one spelling. */
export function read(text) {
  const reader = { text, at: 0 };
  const found = value(reader, 0);
  if (reader.at !== text.length) throw new SyntaxError("something follows the value");
  return found;
}

function value(reader, depth) {
  if (depth > DEEPEST) throw new SyntaxError("nested too deeply");
  const sign = reader.text[reader.at];
  if (sign === "{") return object(reader, depth);
  if (sign === "[") return array(reader, depth);
  if (sign === '"') return string(reader);
  if (sign === "-" || (sign >= "0" && sign <= "9")) return number(match(reader, NUMBER));
  return JSON.parse(match(reader, CONSTANT));
}

function object(reader, depth) {
  const found = Object.create(null); // so that no key has a meaning of its own
  let last;
  for (const _ of entries(reader, "}")) {
    const key = string(reader);
    if (last !== undefined && byCodePoint(last, key) >= 0) throw new SyntaxError("keys are not sorted");
    expect(reader, ":");
    found[key] = value(reader, depth + 1);
    last = key;
  }
  return found;
}

function array(reader, depth) {
  const found = [];
  for (const _ of entries(reader, "]")) found.push(value(reader, depth + 1));
  return found;
}

/** One turn for each entry up to `end`, which whoever loops reads. */
function* entries(reader, end) {
  reader.at += 1;
  if (reader.text[reader.at] !== end) {
    do yield;
    while (reader.text[reader.at] === "," && ++reader.at);
  }
  expect(reader, end);
}

function string(reader) {
  const raw = match(reader, STRING);
  const found = JSON.parse(raw);
  if (write(found) !== raw) throw new SyntaxError("a text in another spelling");
  return found;
}

function number(raw) {
  const found = Number(raw);
  if (INTEGER.test(raw) ? !Number.isSafeInteger(found) : fraction(found) !== raw) {
    throw new SyntaxError("a number that is too large, or in another spelling");
  }
  return found;
}

/** A floating-point number as Python writes it: the shortest digits, an exponent from 1e16 and below 1e-4. */
function fraction(x) {
  if (!Number.isFinite(x)) return undefined;
  const [digits, exponent] = x.toExponential().split("e").map((part, i) => (i ? Number(part) : part));
  if (x && (exponent < -4 || exponent >= 16)) {
    return `${digits}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  }
  return `${Object.is(x, -0) ? "-0" : x}${Number.isInteger(x) ? ".0" : ""}`;
}

function match(reader, pattern) {
  pattern.lastIndex = reader.at;
  const [found] = pattern.exec(reader.text) ?? [];
  if (found === undefined) throw new SyntaxError(`nothing readable at ${reader.at}`);
  reader.at += found.length;
  return found;
}

function expect(reader, sign) {
  if (reader.text[reader.at] !== sign) throw new SyntaxError(`${sign} is missing at ${reader.at}`);
  reader.at += 1;
}
