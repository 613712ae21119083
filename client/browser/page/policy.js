// The policy of a bundle: what may be answered, and what is said instead, as edgeadapt/formats/policy.py has it.

import { parse } from "./dsse.js";
import { ConfigError, TrustError, translated } from "./errors.js";
import { between, listOf, mapOf, misfit, orNull, string } from "./manifests.js";

export const POLICY = "policy.json";
const PRIVATE = "*"; // stands for every private adapter in `combine`
export const NO_POLICY = { unsure: "", denied: "", least: 0, thresholds: {}, deny: [], confirm: [], input: [], output: [], combine: null };
const LONGEST = 2 ** 16; // bytes
const UNSEEN = /\p{Cf}|(?![\s\x1c-\x1f\x85])\p{Cc}/gu; // white space separates words
const patterns = listOf((value) => string(value) && new RegExp(value, "u")); // whoever signs has checked that each is linear
const FIELDS = {
  ...{ unsure: string, denied: string, least: between(0, 1), thresholds: mapOf(string, between(0, 1)), input: patterns },
  ...{ output: patterns, deny: listOf(string), confirm: listOf(string), combine: orNull(listOf(listOf(string))) },
};

/** The policy in the verified files of a base. Throws TrustError: a key is missing, unknown or ill-formed. */
export function policyOf(files) {
  const raw = files.get(POLICY);
  if (!raw) return NO_POLICY;
  return translated(() => {
    if (raw.length > LONGEST) throw new SyntaxError(`it has more than ${LONGEST} bytes`);
    const policy = parse(raw);
    const [field, why] = misfit(policy, FIELDS) ?? [];
    if (field) throw new SyntaxError(`${field} ${why}`);
    return policy;
  }, ({ message }) => new TrustError(`the policy cannot be read: ${message}`, POLICY));
}

/** Whether a pattern is in one of the readings of a text (`Text.readings`). */
export function blocks(patterns, readings) {
  const plain = readings.map((text) => text.replace(/[⟦⟧]/g, "").normalize("NFKC").toLowerCase().replace(UNSEEN, ""));
  const read = plain.map((text) => ` ${text.split(/[\s\x1c-\x1f\x85]+/u).filter(Boolean).join(" ")} `);
  return patterns.some((pattern) => read.some((text) => new RegExp(pattern, "u").test(text)));
}

/** What is answered of `labels`, all [{ label, probability }], most likely first: { outcome, says, labels }. */
export function judged(policy, readings, labels) {
  const [{ label, probability }] = labels;
  const least = Object.hasOwn(policy.thresholds, label) ? policy.thresholds[label] : policy.least;
  const blocked = policy.deny.includes(label) || blocks(policy.input, readings);
  if (blocked) return { outcome: "blocked", says: policy.denied, labels: [] };
  if (probability < least) return { outcome: "unsure", says: policy.unsure, labels: [] };
  const allowed = labels.filter((each) => !policy.deny.includes(each.label));
  return { outcome: policy.confirm.includes(label) ? "confirm" : "answered", says: "", labels: allowed };
}

/** The pieces of a written answer to a text: with patterns of answers, whole or not at all. */
export async function* governed(policy, readings, generation, pieces) {
  const refused = blocks(policy.input, readings);
  if (!refused && !policy.output.length) return yield* pieces;
  let answer = "";
  if (refused) generation.last = { tokens: 0, prompt: 0, reused: 0 };
  else {
    for await (const piece of pieces) {
      answer += piece.text;
      yield { ...piece, text: "" }; // so that it can be stopped
    }
  }
  const blocked = refused || blocks(policy.output, [answer]);
  if (blocked) generation.last.finish = "blocked";
  yield { text: blocked ? policy.denied : answer };
}

/** Refuse adapters that may not answer as one; `manifests` are theirs. Throws ConfigError. */
export function checkCombination({ combine }, manifests) {
  const names = manifests.map(({ name, parent }) => (parent === null ? name : PRIVATE));
  if (names.length < 2 || !combine || combine.some((group) => names.every((name) => group.includes(name)))) return;
  throw new ConfigError(`the policy of the bundle does not combine ${names.join(" and ")}; use one at a time`, "composition.policy");
}
