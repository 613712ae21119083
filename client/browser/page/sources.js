// Where the files of a bundle come from: the page's own server, or a folder that the user picked. Nothing is verified.

import { byCodePoint, concat, decode } from "./bytes.js";
import { DataError, TrustError } from "./errors.js";
import { MAX_ENVELOPE } from "./dsse.js";

/** Files below a URL of the page's own origin; `listing` names the adapters, since HTTP has no folders. */
export class HttpSource {
  constructor(root, listing) {
    [this.root, this.listing] = [new URL(root), new URL(listing)];
  }

  /** The file, if it has at most `limit` bytes. Throws DataError: missing. TrustError: above the limit. */
  async read(path, limit) {
    return fetched(new URL(path, this.root), path, limit);
  }

  async adapterNames() {
    let names;
    try {
      names = JSON.parse(decode(await fetched(this.listing, "bundle.json", MAX_ENVELOPE))).adapters;
    } catch (error) {
      if (!(error instanceof SyntaxError || error instanceof TypeError)) throw error;
    }
    if (!Array.isArray(names)) throw new DataError("bundle.json does not list adapters; start serve-web again", "bundle.json");
    return names.map(String).sort(byCodePoint);
  }
}

/** Files that a folder picker gave: [{ path, file }]. */
export class FolderSource {
  constructor(files) {
    // "bundle/base/manifest.json" → "base/manifest.json": without the picked folder's own name.
    this.files = new Map(files.map(({ path, file }) => [path.split("/").slice(1).join("/"), file]));
  }

  async read(path, limit) {
    const file = this.files.get(path);
    if (!file) throw missing(path);
    if (file.size > limit) throw tooLong(path, limit);
    return new Uint8Array(await file.arrayBuffer());
  }

  async adapterNames() {
    const names = [...this.files.keys()].map((path) => /^adapters\/([^/]+)\.json$/.exec(path)?.[1]);
    return names.filter(Boolean).sort(byCodePoint);
  }
}

/** A file of the page's own origin, at most `limit` bytes; more is refused before it is in memory. Throws as `read`. */
export async function fetched(url, path, limit) {
  let response;
  try {
    response = await fetch(url, { cache: "no-cache", redirect: "error", credentials: "same-origin" });
  } catch {
    throw new DataError(`${path} cannot be fetched; is the server still running?`, fileName(path));
  }
  if (response.status === 404) throw missing(path);
  if (!response.ok) throw new DataError(`${path} cannot be fetched: the server answers ${response.status}`, fileName(path));
  const [parts, reader] = [[], response.body.getReader()];
  let size = 0;
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    parts.push(next.value);
    size += next.value.length;
    if (size > limit) {
      await reader.cancel();
      throw tooLong(path, limit);
    }
  }
  return concat(...parts);
}

const fileName = (path) => path.split("/").at(-1);
const missing = (path) => new DataError(`${path} is missing: copy the bundle again`, fileName(path));
const tooLong = (path, limit) =>
  new TrustError(`${path} is larger than its limit of ${limit} bytes: copy the bundle again`, fileName(path));
