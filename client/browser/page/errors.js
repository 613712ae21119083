// The errors of the page. A message is one line: what is wrong and what to do. As aggregation/errors.py.

export class EdgeAdaptError extends Error {
  /** `about` says what the error is about, for programs and tests: "text", "seed", "base/manifest.json". */
  constructor(message, about = "") {
    super(message);
    this.name = new.target.name;
    this.about = about;
  }
}

/** A file is not what a trusted party signed: digest, signature, base, or version. */
export class TrustError extends EdgeAdaptError {}

/** A setting contradicts another or is out of range, or the browser lacks a feature. */
export class ConfigError extends EdgeAdaptError {}

/** A file, tensor or text cannot be used. */
export class DataError extends EdgeAdaptError {}

/** A peer sent what the protocol does not allow. `peer` names it where it is known. */
export class ProtocolError extends EdgeAdaptError {
  constructor(message, about = "", peer = "") {
    super(peer ? `${peer}: ${message}` : message, about);
    this.peer = peer;
  }

  /** `error` as the fault of `peer`: the same line, the same `about`. */
  static of(error, peer = "") {
    return new ProtocolError(error.message, error.about, peer);
  }

  /** What `work` makes. An error of this `kind` is the fault of `peer`. */
  static async blaming(peer, kind, work) {
    try {
      return await work();
    } catch (error) {
      throw error instanceof kind ? ProtocolError.of(error, peer) : error;
    }
  }
}

const KINDS = { EdgeAdaptError, TrustError, ConfigError, DataError, ProtocolError };
for (const [name, kind] of Object.entries(KINDS)) Object.defineProperty(kind, "name", { value: name }); // a minifier renames classes

/** What `work` makes, or resolves to. What it throws becomes what `refusal` makes of it, except an error of this file. */
export function translated(work, refusal) {
  const refuse = (error) => {
    throw error instanceof EdgeAdaptError ? error : refusal(error);
  };
  try {
    const found = work();
    return found instanceof Promise ? found.catch(refuse) : found;
  } catch (error) {
    return refuse(error);
  }
}

/** A value for a message: quoted, and cut to `limit` characters. */
export const quoted = (value, limit = 80) => `'${[...String(value)].slice(0, limit).join("")}'`;
