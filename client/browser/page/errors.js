// The errors of the page; each message says in one line what is wrong and what to do (aggregation/errors.py).

export class EdgeAdaptError extends Error {
  constructor(message) {
    super(message);
    this.name = new.target.name;
  }
}

/** A file is not what a trusted party signed: digest, signature, base, or version. */
export class TrustError extends EdgeAdaptError {}

/** A choice that cannot be met, or a browser that lacks what is needed. */
export class ConfigError extends EdgeAdaptError {}

/** A file, tensor or text that cannot be used. */
export class DataError extends EdgeAdaptError {}

/** A value as it stands in a message: quoted and not longer than ``limit``. */
export const quoted = (value, limit = 80) => `'${[...String(value)].slice(0, limit).join("")}'`;
