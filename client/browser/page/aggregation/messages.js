// The messages of the protocol, field by field in wire order, and their signatures: aggregation/messages.py, envelope.py.

import { concat, digest, encode as utf8 } from "../bytes.js";
import { ProtocolError } from "../errors.js";
import { signature as signed, verifies } from "../keys.js";
import { HEX, MAX_ROUNDS, SESSION_SPEC } from "./spec.js";
import { blob, decode, encode, fixed, mapping, optional, record, sequence, text, u32, uint, uint64 } from "./wire.js";

export const DEVICE_ID = "[A-Za-z0-9]([A-Za-z0-9._:-]{0,62}[A-Za-z0-9])?";
export const MAX_CERTIFICATE = 2048; // bytes of DER
export const COORDINATOR = "coordinator"; // its name in errors
export const SHARE = 33; // bytes
export const AEAD_TAG = 16; // bytes
export const MAX_COHORT = 10_000;
const SIGNATURE = 64; // bytes
export const OVERHEAD = 128; // bytes: more than magic, version, tag, lengths and signature take
const MIB = 2 ** 20;
const [MAGIC, VERSION] = ["EA", 1];
const FRAME = utf8("edgeadapt/1\0");

/** Throws ProtocolError: the coordinator sent what the protocol, or this device's policy, does not allow. */
export function refuse(text, about) {
  throw new ProtocolError(text, about, COORDINATOR);
}

const DIGEST = fixed(32);
const DEVICE = text(DEVICE_ID);
const DEVICES = sequence(DEVICE, MAX_COHORT);
const EACH_ROUND = sequence(fixed(32), MAX_ROUNDS);
const ENCRYPTED_SHARES = record({
  ciphertext: blob(MAX_ROUNDS * 2 * SHARE + AEAD_TAG),
  digests: sequence(fixed(16), 2 * MAX_ROUNDS),
});
const SHARES_BY_DEVICE = mapping(DEVICE, ENCRYPTED_SHARES, MAX_COHORT);
const SHARE_BY_DEALER = mapping(DEVICE, fixed(SHARE), MAX_COHORT);
const CERTIFICATE = blob(MAX_CERTIFICATE);

/** A message: its tag, the limit of its body in bytes, and the codec of its body. */
export function message(tag, limit, fields) {
  const codec = record(fields);
  return {
    tag,
    limit,
    codec,
    encode: (value) => encode(codec, value),
    decode: (raw) => decode(codec, raw),
    digest: (value) => digest(concat(utf8(`${tag}\0`), encode(codec, value))),
  };
}

export const Challenge = message("challenge", 1024, { nonce: DIGEST, node: uint64 });
export const CheckIn = message("check-in", 4096, { challenge: DIGEST, certificate: CERTIFICATE, last_offer: optional(DIGEST) });
export const Offer = message("offer", 32 * MIB, {
  session: DIGEST,
  spec: SESSION_SPEC,
  certificates: sequence(CERTIFICATE, MAX_COHORT),
});
export const Advert = message("advert", MIB, {
  offer: DIGEST,
  device: DEVICE,
  share_key: fixed(32),
  mask_keys: EACH_ROUND,
  commitments: EACH_ROUND,
});
export const Roster = message("roster", 256 * MIB, { offer: DIGEST, adverts: sequence(blob(MIB), MAX_COHORT) });
export const Shares = message("shares", 64 * MIB, { context: DIGEST, device: DEVICE, encrypted_shares: SHARES_BY_DEVICE });
export const Plan = message("plan", 4 * MIB, {
  context: DIGEST,
  round: uint(32),
  members: DEVICES,
  adapter_version: uint64,
  adapter_digest: HEX,
  training: blob(MIB),
  former: DEVICES,
});
export const Assignment = message("assignment", 64 * MIB, { plan: Plan.codec, encrypted_shares: SHARES_BY_DEVICE });
export const MaskedInput = message("masked-input", 1024, { plan: DIGEST, device: DEVICE, vector: DIGEST });
export const Survivors = message("survivors", 4 * MIB, { plan: DIGEST, vectors: mapping(DEVICE, DIGEST, MAX_COHORT) });
export const ConsistencySignature = message("consistency-signature", 1024, { survivors: DIGEST, device: DEVICE });
export const Unmask = message("unmask", 8 * MIB, {
  survivors: Survivors.codec,
  consistency_signatures: mapping(DEVICE, fixed(SIGNATURE), MAX_COHORT),
});
export const UnmaskResponse = message("unmask-response", 4 * MIB, {
  survivors: DIGEST,
  device: DEVICE,
  seeds: SHARE_BY_DEALER,
  keys: SHARE_BY_DEALER,
});

const ENVELOPE = record({
  magic: fixed(2),
  version: uint(8),
  tag: text("[a-z-]{1,32}"),
  body: blob(2 ** 29),
  signature: fixed(SIGNATURE),
});

const framed = (tag, body) => concat(FRAME, [tag.length], utf8(tag), body);

/** The signature of `key`, an Ed25519 CryptoKey, on `body` under `tag`. */
export const signature = (key, tag, body) => signed(key, framed(tag, body));

/** `value` as it travels, signed with `key`, an Ed25519 CryptoKey. */
export async function sign(key, kind, value) {
  const body = kind.encode(value);
  return encode(ENVELOPE, { magic: utf8(MAGIC), version: VERSION, tag: kind.tag, body, signature: await signature(key, kind.tag, body) });
}

/** Returns if `signer` (32 bytes) signed `body` under `tag`; else throws ProtocolError. */
export async function verify(signer, tag, body, signature) {
  if (await verifies({ raw: signer }, signature, framed(tag, body))) return;
  throw new ProtocolError(`signature on ${tag} is not valid`, "signature");
}

/** The message of this kind that `signer` signed; `peer` is its name in errors. Throws ProtocolError: too large, not canonical, of
 * another type or version, or not signed by `signer`. */
export async function openVerified(kind, raw, signer, peer) {
  try {
    if (raw.length > kind.limit + OVERHEAD) {
      throw new ProtocolError(`${kind.tag} of ${raw.length} bytes is over the limit of ${kind.limit}`, "envelope.size");
    }
    // A copy: what was verified must not change while this waits.
    const { magic, version, tag, body, signature } = decode(ENVELOPE, raw.slice());
    if (String.fromCharCode(...magic) !== MAGIC || version !== VERSION) {
      throw new ProtocolError(`not a message of protocol version ${VERSION}`, "envelope.version");
    }
    if (tag !== kind.tag) throw new ProtocolError(`expected ${kind.tag}, got ${tag}`, "envelope.tag");
    await verify(signer, tag, body, signature);
    return kind.decode(body);
  } catch (error) {
    throw error instanceof ProtocolError && !error.peer ? ProtocolError.of(error, peer) : error;
  }
}

/** The body of a message whose signer is not known yet: only to find out which key must verify it. */
export const unverifiedBody = (raw) => decode(ENVELOPE, raw).body;

/** The signed header of a masked input: the part of it that is logged. */
export function signedHeader(raw) {
  const end = raw.length - 4;
  return raw.slice(end - new DataView(raw.buffer, raw.byteOffset + end).getUint32(0), end);
}

/** A masked input as it travels: vector, signed header, length of the header. */
export const withVector = (packed, header) => concat(packed, header, u32(header.length));
