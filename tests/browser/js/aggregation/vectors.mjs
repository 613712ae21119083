// The vectors of tests/vectors/rounds.json, and the devices in them.

import { readFileSync } from "node:fs";

import { Root } from "../../../../client/browser/page/aggregation/certificates.js";
import { Device } from "../../../../client/browser/page/aggregation/device.js";
import { privateKey } from "../../../../client/browser/page/aggregation/masks.js";
import { Policy } from "../../../../client/browser/page/aggregation/policy.js";

export const read = (name) => JSON.parse(readFileSync(new URL(`../../../vectors/${name}`, import.meta.url), "utf8"));
export const raw = (digits) => new Uint8Array(Buffer.from(digits, "hex"));
export const hex = (bytes) => Buffer.from(bytes).toString("hex");
export const CASES = read("rounds.json");

/** The public half of a private Ed25519 key of 32 bytes. */
export async function publicHalf(seed) {
  const der = Buffer.concat([Buffer.from("302e020100300506032b657004220420", "hex"), seed]);
  const key = await crypto.subtle.importKey("pkcs8", der, "Ed25519", true, ["sign"]);
  return new Uint8Array(Buffer.from((await crypto.subtle.exportKey("jwk", key)).x, "base64url"));
}

/** Bytes of the vector, in order, in place of randomness. */
export function given(digits) {
  const left = raw(digits);
  let at = 0;
  const entropy = async (n) => {
    if (at + n > left.length) throw new Error("more randomness is drawn than the vector has");
    return left.slice(at, (at += n));
  };
  entropy.left = () => left.length - at;
  return entropy;
}

export async function deviceOf(name, { identities, certificates, root, policy }) {
  const seed = raw(identities[name]);
  return new Device({
    key: await privateKey(seed, "Ed25519", ["sign"]),
    publicKey: await publicHalf(seed),
    certificate: raw(certificates[name]),
    root: await Root.open(raw(root)),
    coordinator: await publicHalf(raw(identities.coordinator)),
    policy: new Policy(policy),
  });
}

export const POLICY = { minimum_cohort: 3, minimum_survivors: 2, minimum_ring_bits: 8, corrupt_fraction: 0, complete_up_to: 3 };
