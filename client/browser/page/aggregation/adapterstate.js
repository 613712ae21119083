// What a device remembers, across sessions, of the adapter that it trained from last, as client/node/adapterstate.py: sums from
// one adapter are over one set of devices, and few. It is in memory, as long as the identity key that it belongs to.

import { hex } from "../bytes.js";
import { refuse } from "./messages.js";

export const EARLIER = 1024; // adapters

/** The state after the device trained for `plan`; `known` is null before the first one. `repeats`: the policy's maximum. Throws
 * ProtocolError: the adapter is older than the last one, another one of its version, one that the device left after it revealed shares,
 * or used up; or it was trained on other terms before. */
export function onPlan(known, plan, spec, repeats) {
  const { adapter_version: version, adapter_digest: digest } = plan;
  const terms = termsOf(plan, spec);
  const fresh = { version, digest, terms, sums: 0, survivors: new Map(), dealt: "", earlier: [] };
  if (known === null) return fresh;
  if (version < known.version) {
    refuse(`adapter ${version} of the plan is older than adapter ${known.version}, which this device trained from`, "plan.adapter_version");
  }
  if (version === known.version && digest !== known.digest) {
    refuse(`this device trained from another adapter ${version} than that of the plan`, "plan.adapter_version");
  }
  if (digest !== known.digest) {
    const earlier = known.sums ? [...known.earlier, known.digest].slice(-EARLIER) : known.earlier;
    if (earlier.includes(digest)) {
      refuse(`adapter ${version} of the plan is an earlier one again, from which this device revealed shares`, "plan.adapter_digest");
    }
    return { ...fresh, earlier };
  }
  if (known.sums > repeats) {
    refuse(`this device revealed shares for ${known.sums} sums from adapter ${version}; its policy permits no other`, "plan.repeats");
  }
  if (known.sums && terms !== known.terms) {
    refuse(`adapter ${version} was trained with other settings, clip norm or weight cap before its sum was unmasked`, "plan.terms");
  }
  if (known.sums && dealt(plan, spec) !== known.dealt) {
    refuse(`the last sum from adapter ${version} had other groups: this device helps to no sum with others`, "plan.groups");
  }
  return { ...known, version, terms };
}

/** What the coordinator chose of an update besides the adapter. */
export const termsOf = ({ training }, { clip_norm: clip, weight_cap: cap }) => `${clip}/${cap}/${hex(training)}`;

/** How many devices a sum has more than the one before, and how many it lacks that were not revoked since: Maps of name → serial. */
export function differing(before, survivors, revoked) {
  const added = [...survivors.keys()].filter((name) => !before.has(name));
  const lacking = [...before].filter(([name, serial]) => !survivors.has(name) && !revoked.has(serial));
  return [added.length, lacking.length];
}

/** What the groups of a plan follow from, besides the adapter; empty without groups. */
function dealt({ members, former }, { grouping }) {
  return grouping ? `${grouping.count}/${[...new Set([...members, ...former])].sort()}` : "";
}

/** The state after the device reveals shares, or with groups signs the survivor set, for a sum over `survivors`: a Map of device →
 * serial of its certificate. `revoked` is a Set of serials. Throws ProtocolError: it trained from another adapter since, or the last sum
 * has other devices. */
export function onSurvivors(known, plan, spec, survivors, revoked) {
  if (known?.digest !== plan.adapter_digest) {
    refuse(`adapter ${plan.adapter_version} of the sum is not the one that this device trained from last`, "survivors.adapter");
  }
  const [added, lacking] = differing(known.survivors, survivors, revoked);
  if (known.sums && added + lacking) {
    const text = `this one has ${added} more, and lacks ${lacking} whose certificates are not revoked`;
    refuse(`the last sum from adapter ${plan.adapter_version} was over other devices: ${text}`, "survivors.repeat");
  }
  return { ...known, sums: known.sums + 1, survivors, dealt: dealt(plan, spec) };
}
