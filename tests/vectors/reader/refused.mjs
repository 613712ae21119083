/** What a reader of bundles throws: `rule` is one of docs/reference/bundle-format.md, "Rules". */
export class Refused extends Error {
  constructor(rule, why) {
    super(`${rule}: ${why}`);
    this.rule = rule;
  }
}

/** Return if `holds`; else throw. */
export function require(holds, rule, why) {
  if (!holds) throw new Refused(rule, why);
}
