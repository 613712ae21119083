// Invitations (edgeadapt/formats/gateway/invitation.py), and enrolment with one at the authority, and renewal
// (coordinator/gateway/enrolment.py). The secret of an invitation stays here: it is the seed of a key that signs the request. Who receives
// the request instead of the authority can have no other key certified.

import { Root } from "./aggregation/certificates.js";
import { privateKey } from "./aggregation/masks.js";
import { DEVICE_ID, MAX_CERTIFICATE, signature } from "./aggregation/messages.js";
import { conversation } from "./aggregation/websocket.js";
import { blob, decode, encode, fixed, record, text } from "./aggregation/wire.js";
import { concat, digest, encode as utf8, equal, unbase64, unbase64url } from "./bytes.js";
import { ConfigError, EdgeAdaptError, TrustError } from "./errors.js";
import { requireStrong } from "./keys.js";

const PREFIX = "edgeadapt2.";
const MAX_TEXT = 2 ** 16; // characters
const CHECK = 4; // bytes of a digest, for mistakes in copying
const ADDRESS = "[A-Za-z0-9.:_\\[\\]-]{3,260}";
const INVITATION = record({
  secret: fixed(16),
  device: text(DEVICE_ID),
  enrolment: text(ADDRESS),
  gateway: text(`${ADDRESS}(,${ADDRESS}){0,7}`),
  authority: blob(MAX_CERTIFICATE),
  coordinator: fixed(32),
});
const ENROLMENT = record({ invited: fixed(32), signature: fixed(64), request: blob(8192) });
const RENEWAL = record({ certificate: blob(MAX_CERTIFICATE), signature: fixed(64) });
const PATIENCE = 30_000; // milliseconds
const [INVALID, VIOLATION, LATER] = [1007, 1008, 1013]; // close codes

/** The record in a token. Throws ConfigError: it was not copied as a whole, or is no invitation. */
export async function readInvitation(token) {
  const stripped = token.trim();
  try {
    if (!stripped.startsWith(PREFIX) || stripped.length > MAX_TEXT) throw new SyntaxError();
    const raw = unbase64url(stripped.slice(PREFIX.length));
    const body = raw.slice(0, -CHECK);
    if (!equal((await digest(body)).slice(0, CHECK), raw.slice(-CHECK))) throw new SyntaxError();
    const found = decode(INVITATION, body);
    await Root.open(found.authority);
    requireStrong(found.coordinator);
    return found;
  } catch (error) {
    if (!(error instanceof EdgeAdaptError || error instanceof SyntaxError)) throw error;
    throw new ConfigError("the token is not an invitation: copy the whole line that 'edgeadapt authority invite' prints", "token");
  }
}

/** The certificate, DER, that the authority at `url` issues for a request, PEM. Throws TrustError: the authority refuses, and says why.
 * EdgeAdaptError: it cannot be reached; the same can be asked again. */
export async function certified(url, { secret }, request) {
  const der = unbase64(request.replace(/-----[A-Z ]+-----|\s/g, ""));
  const { key, invited } = await keyOf(secret);
  const asked = encode(ENROLMENT, { invited, signature: await signature(key, "enrolment", der), request: der });
  return answered(await exchanged(url, asked), "press Enrol again");
}

/** A newer certificate for the same key, DER. `url` of the enrolment service, `key` that of the identity. Throws as `certified`. */
export async function renewed(url, { certificate, key }) {
  const asked = encode(RENEWAL, { certificate, signature: await signature(key, "renewal", certificate) });
  return answered(await exchanged(url.replace(/enrol$/, "renew"), asked), "it is asked again at the next visit");
}

function answered({ certificate, code, reason }, next) {
  if (certificate) return certificate;
  if (code === INVALID || code === VIOLATION) throw new TrustError(`the authority refuses: ${reason}`, "enrolment");
  const why = code === LATER ? reason : "it cannot be reached, or broke off";
  throw new EdgeAdaptError(`the authority did not certify this device: ${why}; ${next}`, "enrolment");
}

/** The key of an invitation: its seed is SHA-256 of the secret after a tag. */
async function keyOf(secret) {
  const seed = await digest(concat(utf8("edgeadapt/invitation\0"), secret));
  const key = await privateKey(seed, "Ed25519", ["sign"], true);
  const { x } = await crypto.subtle.exportKey("jwk", key); // WebCrypto gives the public half in no other way
  return { key, invited: unbase64url(x) };
}

/** One message to the authority, and its answer: { certificate, code, reason }. */
async function exchanged(url, asked) {
  let certificate = null;
  const received = (raw) => {
    certificate = raw;
  };
  const ended = await conversation(url, AbortSignal.timeout(PATIENCE), received, (socket) => socket.send(asked));
  return { certificate, ...ended };
}
