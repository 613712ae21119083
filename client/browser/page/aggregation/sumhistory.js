// The sums without noise that a device helped to, from which adapters and over whom, as client/node/sumhistory.py: an adapter
// that hardly differs from another one counts as the same. Adapters are compared by sketches, as client/node/sketch.py.

import { concat, digest, encode } from "../bytes.js";
import { A, B, HEAD, R, VECTORS, adapterOf, decodeTask, isAnalytic, isPrivate, partOf } from "../learning/task.js";
import { EARLIER, differing, termsOf } from "./adapterstate.js";
import { keystream, streamKey } from "./masks.js";
import { refuse } from "./messages.js";

const BUCKETS = 32;
const PARTS = [A, B, VECTORS, HEAD, R, "frozen"];
const LEAST_STEP = 0.1; // L2 norm, weight units
const [UPDATES, MOMENTS] = ["updates", "moments"]; // kinds of sums

/** The history of a device before its first round: `key` of the sketches, 32 secret bytes; the last sums of each kind; earlier ones. */
export const newHistory = () => ({ key: crypto.getRandomValues(new Uint8Array(32)), last: [], earlier: [], round: null });

/** The sketch of an adapter, a Map of name → { values }: `BUCKETS` numbers for each part. */
export async function sketch(adapter, key) {
  const sums = new Float64Array(PARTS.length * BUCKETS);
  for (const [name, { values }] of adapter) {
    const seed = await digest(concat(encode("edgeadapt/sketch/1\0"), key, encode(name)));
    const drawn = await keystream(await streamKey(seed), 0, values.length);
    const first = PARTS.indexOf(partOf(name)) * BUCKETS;
    values.forEach((value, i) => (sums[first + (drawn[i] % BUCKETS)] += drawn[i] & 0x80 ? -value : value));
  }
  return Float32Array.from(sums);
}

/** The distance between two adapters over some parts, from their sketches. */
export function separation(one, other, parts) {
  return Math.hypot(...one.map((value, i) => (parts.includes(PARTS[Math.floor(i / BUCKETS)]) ? value - other[i] : 0)));
}

/** The distance below which two adapters count as one, as `least_movement` of edgeadapt/rounds/task.py; `size`: of an update. */
export function leastMovement(task, clipNorm, size, share) {
  if (isAnalytic(task)) return share * LEAST_STEP;
  const { optimizer, learning_rate: rate, gradient_norm: limit, momentum } = task;
  const step = optimizer === "adamw" ? rate * Math.sqrt(size) : (rate * Math.min(limit || 1, 1)) / (1 - momentum);
  return share * Math.max(Math.min(clipNorm, step), LEAST_STEP);
}

/** The history to keep before the contribution to a round leaves. `known` is null before the first one; `blob` is the adapter's file;
 * `share` the policy's `minimum_movement`. Throws ProtocolError: the adapter is too near to one from which there was a sum over earlier
 * devices, on other terms, or in other groups. */
export async function onPlan(known, plan, spec, blob, share) {
  if (spec.privacy) return known;
  const { key, last, earlier } = known ?? (known = newHistory());
  const [task, version] = [decodeTask(plan.training), plan.adapter_version];
  const now = await pointOf(key, plan, spec, task, await adapterOf(plan, blob));
  const least = leastMovement(task, spec.clip_norm, spec.vector.segments[0].size, share);
  const found = (text, far) => `adapter ${version} ${text.replace("%", far.toPrecision(1))}, less than ${least.toPrecision(1)}`;
  for (const far of earlier.map((each) => distance(each, now, task))) {
    if (far < least) refuse(found("is % from an earlier one, whose sum was over other devices", far), "plan.movement");
  }
  const bound = [];
  let movement = least;
  for (const { kind, points } of last) {
    const near = points.map((each) => ({ ...each, far: distance(each, now, task) })).filter(({ far }) => far < least);
    if (near.length) bound.push(kind);
    for (const { terms, adapter, far } of near) {
      movement = Math.min(movement, far);
      if (kind === now.kind && terms !== now.terms) {
        refuse(found("has moved by % since it was trained with other settings, clip norm or weight cap", far), "plan.terms");
      }
      if (spec.grouping && adapter !== now.adapter) refuse(found("has other groups, and moved by % since the last sum", far), "plan.groups");
    }
  }
  return { ...known, round: { point: now, bound, movement, least } };
}

/** The history after the device reveals shares, or with groups signs the survivor set, for a sum over `survivors`, as of
 * adapterstate.js. Throws ProtocolError: it trained for another plan since, or the adapter is near to one from which the last sum was
 * over other devices. */
export function onSurvivors(known, plan, spec, survivors, revoked) {
  if (spec.privacy) return known;
  const { point, bound, movement, least } = known?.round ?? {};
  if (point?.adapter !== plan.adapter_digest) {
    refuse(`adapter ${plan.adapter_version} of the sum is not the one that this device trained from last`, "survivors.adapter");
  }
  const changed = (sums) => differing(sums.survivors, survivors, revoked).reduce((sum, count) => sum + count);
  for (const sums of known.last) {
    if (!bound.includes(sums.kind) || !changed(sums)) continue;
    const moved = `has moved by ${movement.toPrecision(1)} since a sum over other devices, less than ${least.toPrecision(1)}`;
    refuse(`adapter ${plan.adapter_version} ${moved}, and this sum differs in ${changed(sums)}`, "survivors.movement");
  }
  const before = known.last.find(({ kind }) => kind === point.kind);
  const others = known.last.filter((sums) => sums !== before);
  const same = before && !changed(before);
  const isKnown = same && before.points.some(({ adapter, terms }) => adapter === point.adapter && terms === point.terms);
  const points = same ? [...before.points, ...(isKnown ? [] : [point])].slice(-EARLIER) : [point];
  const earlier = same ? known.earlier : [...known.earlier, ...(before?.points ?? [])].slice(-EARLIER);
  return { ...known, last: [...others, { kind: point.kind, survivors, points }], earlier };
}

async function pointOf(key, plan, spec, task, adapter) {
  const kind = isAnalytic(task) ? MOMENTS : UPDATES;
  const form = JSON.stringify([spec.layout_digest, task.peft_config, task.labels]);
  return { kind, base: spec.base_digest, adapter: plan.adapter_digest, terms: termsOf(plan, spec), form, sketch: await sketch(adapter, key) };
}

/** The distance between the adapters of two sums; 0 if they cannot be compared, though of one base, or of an unknown one. */
function distance(before, now, task) {
  if ((before.base ?? now.base) !== now.base) return Infinity;
  if (before.form !== now.form) return 0;
  // The score of both kinds depends on the head; embeddings do not.
  const influences = (part) => (now.kind === MOMENTS ? part !== HEAD || before.kind === UPDATES : !isPrivate(task, part));
  return separation(before.sketch, now.sketch, PARTS.filter(influences));
}
