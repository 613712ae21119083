// Bytes, text and digests: the few conversions that several modules need.

const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Text of UTF-8 bytes. Throws TypeError if they are not. */
export const decode = (bytes) => UTF8.decode(bytes);

export const encode = (text) => new TextEncoder().encode(text);

export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

export function unhex(text) {
  return Uint8Array.from({ length: text.length / 2 }, (_, i) => parseInt(text.slice(2 * i, 2 * i + 2), 16));
}

/** Bytes as a base64 text of the standard alphabet. */
export const base64 = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));

/** Bytes of a base64 text of the standard alphabet. Throws SyntaxError for any other text. */
export function unbase64(text) {
  const binary = typeof text === "string" && /^[A-Za-z0-9+/]*={0,2}$/.test(text) && text.length % 4 === 0 ? atob(text) : "";
  // Encoded again, so that no two texts stand for the same bytes: the last letter may have bits that are not used.
  if (btoa(binary) !== text) throw new SyntaxError("a base64 text of the standard alphabet is needed");
  return Uint8Array.from(binary, (unit) => unit.charCodeAt(0));
}

/** Bytes of a base64url text without padding (RFC 4648, section 5). Throws SyntaxError for any other text. */
export function unbase64url(text) {
  if (!/^[A-Za-z0-9_-]*$/.test(text)) throw new SyntaxError("a base64url text is needed");
  const standard = text.replace(/-/g, "+").replace(/_/g, "/");
  return unbase64(standard + "=".repeat(-standard.length & 3));
}

/** SHA-256 of bytes, 32 bytes; `sha256` gives it in hexadecimal digits. */
export const digest = async (bytes) => new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));

export const sha256 = async (bytes) => hex(await digest(bytes));

export const equal = (left, right) => left.length === right.length && left.every((byte, i) => byte === right[i]);

export function concat(...parts) {
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** The order in which Python sorts text: by code point; JavaScript compares UTF-16 units. */
export function byCodePoint(left, right) {
  const a = Array.from(left, (sign) => sign.codePointAt(0));
  const b = Array.from(right, (sign) => sign.codePointAt(0));
  for (let i = 0; i < Math.min(a.length, b.length); i++) if (a[i] !== b[i]) return a[i] - b[i];
  return a.length - b.length;
}
