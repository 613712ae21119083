// The parts of an adapter that a device trains in the rounds and does not share, as client/training/private.py and
// client/node/privateparts.py: { subject, values, ever } in the identity's record, which is of one base; null at first. A part that was
// private once stays private: no later round shares a part in `ever`, whatever the labels and the layout are.

import { refuse } from "../aggregation/messages.js";
import { B, R, partOf } from "./task.js";

/** What private parts belong to: the base, and the method, labels and layout of the adapter. */
export const subjectOf = ({ base_digest: base, layout_digest: layout }, { peft_config: config, labels }) => JSON.stringify([base, config, labels, layout]);

export const isPrivate = ({ trained, shared }, part) => trained.includes(part) && !shared.includes(part);
const privateOf = (values, task) => [...values].filter(([name]) => isPrivate(task, partOf(name)));

/** The values, with those of the parts that are private in the task as `kept` has them. */
export function withPrivate(values, kept, subject, task) {
  return kept?.subject === subject ? new Map([...values, ...privateOf(kept.values, task)]) : values;
}

/** What to keep after a round; null if its task has no private parts, so that `kept` stays. */
export function toKeep(kept, subject, trained, task) {
  const values = new Map(privateOf(trained, task));
  const ever = new Set([...(kept?.ever ?? []), ...[...values.keys()].map(partOf)]);
  return values.size ? { subject, values, ever: [...ever].sort() } : null;
}

/** Check that a task shares no part that was ever private. An update of R is one of B, to which it is added. Throws ProtocolError: it shares one. */
export function checkUnshared(kept, { shared }) {
  const changed = shared.map((part) => (part === R ? B : part));
  const refused = kept?.ever.find((part) => changed.includes(part));
  if (!refused) return;
  const text = `task.shared: this device keeps the part ${refused} to itself, because it trained it without sharing it: take a method that does not share it, or ask its person to forget its identity`;
  refuse(text, "task.shared");
}
