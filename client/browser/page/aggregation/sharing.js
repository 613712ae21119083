// Encrypted shares, as aggregation/sharing.py: a dealer's secrets, shared among its neighbors, encrypted for each holder.

import { concat, digest, encode as utf8, equal, hex, unhex } from "../bytes.js";
import { ConfigError } from "../errors.js";
import { derive, sharedSecret } from "./masks.js";
import { AEAD_TAG, SHARE } from "./messages.js";

const PRIME = 2n ** 256n + 297n;
const DRAW = 48; // bytes: reduced mod p, 384 bits are uniform to within a distance of 2^-127

const whole = (bytes) => BigInt(`0x${hex(bytes)}`);
const share = (value) => unhex(value.toString(16).padStart(2 * SHARE, "0"));

/**
 * Share the secrets of every round, [{ maskKey, seed }] of 32 bytes each, among the dealer and its neighbors.
 *
 * Returns the dealer's own pairs, one { seed, key } for each round, and a Map of neighbor → encrypted shares.
 */
export async function deal(session, dealer, shareKey, secrets, entropy) {
  const holders = [dealer, ...session.neighbors(dealer, session.peers.keys())];
  const points = holders.map((device) => session.peers.get(device).position);
  const pairs = new Map(holders.map((holder) => [holder, []]));
  for (const { seed, maskKey } of secrets) {
    const seeds = await split(seed, session.spec.threshold, points, entropy);
    const keys = await split(maskKey, session.spec.threshold, points, entropy);
    holders.forEach((holder, i) => pairs.get(holder).push({ seed: seeds[i], key: keys[i] }));
  }
  const encrypted = new Map();
  for (const holder of holders.slice(1)) {
    encrypted.set(holder, await encrypt(session, shareKey, dealer, holder, pairs.get(holder)));
  }
  return [pairs.get(dealer), encrypted];
}

async function encrypt(session, shareKey, dealer, holder, pairs) {
  const shares = pairs.flatMap(({ seed, key }) => [seed, key]);
  const key = await keyOf(session, shareKey, session.peers.get(holder), dealer, holder);
  const ciphertext = new Uint8Array(await crypto.subtle.encrypt(gcm(session), key, concat(...shares)));
  return { ciphertext, digests: await Promise.all(shares.map(shareDigest)) };
}

/** One pair for each round, or null if the dealer encrypted something that does not match its digests. */
export async function decrypt(session, shareKey, dealer, holder, { ciphertext, digests }) {
  const { rounds } = session.spec;
  if (ciphertext.length !== 2 * rounds * SHARE + AEAD_TAG || digests.length !== 2 * rounds) return null;
  const key = await keyOf(session, shareKey, session.peers.get(dealer), dealer, holder);
  let plain;
  try {
    plain = new Uint8Array(await crypto.subtle.decrypt(gcm(session), key, ciphertext));
  } catch {
    return null; // one bad dealer must not stop the others
  }
  const shares = digests.map((_, i) => plain.slice(SHARE * i, SHARE * (i + 1)));
  const found = await Promise.all(shares.map(shareDigest));
  if (!found.every((one, i) => equal(one, digests[i]))) return null;
  return Array.from({ length: rounds }, (_, i) => ({ seed: shares[2 * i], key: shares[2 * i + 1] }));
}

// The key serves one encryption, so the nonce can be zero.
const gcm = (session) => ({ name: "AES-GCM", iv: new Uint8Array(12), additionalData: session.context });

const shareDigest = async (share) => (await digest(concat(utf8("edgeadapt/share/1\0"), share))).slice(0, 16);

async function keyOf(session, shareKey, peer, dealer, holder) {
  const secret = await sharedSecret(shareKey, peer.shareKey);
  return derive(secret, "AES-GCM", utf8("edgeadapt/share-encryption/1"), session.context, utf8(dealer), utf8(holder));
}

// The dealer's half of Shamir's secret sharing over the integers modulo 2^256 + 297, as aggregation/shamir.py.

/**
 * One share of 33 bytes of `secret` (32 bytes) for each of `points`, distinct positive numbers; any `threshold` of them
 * reconstruct it. `entropy` draws the coefficients, the highest power first.
 */
async function split(secret, threshold, points, entropy) {
  if (secret.length !== 32 || threshold < 1 || threshold > new Set(points).size || Math.min(...points) < 1) {
    throw new ConfigError(`cannot share ${secret.length} bytes among ${points.length} points`, "shamir.split");
  }
  const drawn = await entropy(DRAW * (threshold - 1));
  const coefficients = Array.from({ length: threshold - 1 }, (_, i) => whole(drawn.subarray(DRAW * i, DRAW * (i + 1))) % PRIME);
  drawn.fill(0);
  coefficients.push(whole(secret));
  return points.map((x) => share(coefficients.reduce((value, next) => (value * BigInt(x) + next) % PRIME, 0n)));
}
