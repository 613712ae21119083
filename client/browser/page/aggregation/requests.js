// Certificate requests (PKCS #10, RFC 2986), as aggregation/pki/requests.py: how a device's key reaches the authority.

import { base64, concat, encode as utf8, unbase64, unhex } from "../bytes.js";
import { ConfigError, TrustError, quoted } from "../errors.js";
import { DEVICE_ID } from "./messages.js";

const [SEQUENCE, SET, UTF8, BITS, ATTRIBUTES] = [0x30, 0x31, 0x0c, 0x03, 0xa0]; // tags
const VERSION = unhex("020100");
const [COMMON_NAME, ED25519] = [unhex("0603550403"), unhex("06032b6570")]; // object identifiers
const MAX_PEM = 8192; // bytes

/** A request for a certificate for the device `name`, in PEM. `pair`: of Ed25519 (`signingKey`). Throws ConfigError. */
export async function request(pair, name) {
  if (!new RegExp(`^(?:${DEVICE_ID})$`).test(name)) {
    const rule = "1 to 64 letters, digits, '.', '_', ':' or '-', with a letter or digit at both ends";
    throw new ConfigError(`a device cannot be named ${quoted(name, 64)}: ${rule}`, "name");
  }
  const key = new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey));
  const subject = der(SEQUENCE, der(SET, der(SEQUENCE, COMMON_NAME, der(UTF8, utf8(name)))));
  const info = der(SEQUENCE, VERSION, subject, der(SEQUENCE, der(SEQUENCE, ED25519), bits(key)), der(ATTRIBUTES));
  const signature = new Uint8Array(await crypto.subtle.sign("Ed25519", pair.privateKey, info));
  return toPem("CERTIFICATE REQUEST", der(SEQUENCE, info, der(SEQUENCE, ED25519), bits(signature)));
}

const bits = (bytes) => der(BITS, Uint8Array.of(0), bytes); // no unused bits

/** An element of DER (X.690) with less than 2^16 bytes. */
function der(tag, ...parts) {
  const content = concat(...parts);
  const size = content.length;
  const length = size < 0x80 ? [size] : size < 0x100 ? [0x81, size] : [0x82, size >> 8, size & 0xff];
  return concat(Uint8Array.of(tag, ...length), content);
}

const toPem = (label, bytes) =>
  `-----BEGIN ${label}-----\n${base64(bytes).replace(/.{64}(?=.)/g, "$&\n")}\n-----END ${label}-----\n`;

/** The bytes in a PEM text that holds one certificate. Throws TrustError; `what` names the text. */
export function certificateIn(text, what) {
  const match = text.length <= MAX_PEM && /^\s*-----BEGIN CERTIFICATE-----([^-]*)-----END CERTIFICATE-----\s*$/.exec(text);
  try {
    if (match) return unbase64(match[1].replace(/\s/g, ""));
  } catch {
    // refused below
  }
  throw new TrustError(`${what} is not one certificate in PEM form`, "certificate");
}
