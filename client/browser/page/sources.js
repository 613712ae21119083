// Where the files of a bundle come from: the page's own server, or a folder that the user picked. Nothing is verified.

import { byCodePoint, concat, decode } from "./bytes.js";
import { DataError, TrustError, translated } from "./errors.js";
import { MAX_ENVELOPE } from "./dsse.js";

const REQUEST = { cache: "no-cache", redirect: "error", credentials: "same-origin" };

/** Files below a URL of the page's own origin; `listing` names the adapters, since HTTP has no folders. */
export class HttpSource {
  constructor(root, listing) {
    [this.root, this.listing] = [new URL(root), new URL(listing)];
  }

  /** The file, if it has at most `limit` bytes; `count` is called with the number of bytes of each part that arrives. Throws DataError:
   * missing, or the server cannot be reached. TrustError: above the limit. */
  async read(path, limit, count) {
    return fetched(new URL(path, this.root), path, limit, count);
  }

  /** The number of bytes of a file as the server states it; null if it does not, or states that of a compressed one. */
  async size(path) {
    const response = await fetch(new URL(path, this.root), { ...REQUEST, method: "HEAD" }).catch(() => null);
    const plain = response?.ok && !response.headers.has("Content-Encoding");
    const length = plain ? response.headers.get("Content-Length") : null;
    return length === null ? null : Number(length);
  }

  async adapterNames() {
    const listed = await fetched(this.listing, "bundle.json", MAX_ENVELOPE);
    const refusal = () => new DataError("bundle.json does not list adapters; start serve-web again", "bundle.json");
    const names = translated(() => JSON.parse(decode(listed)).adapters, refusal);
    if (!Array.isArray(names)) throw refusal();
    return names.map(String).sort(byCodePoint);
  }
}

/** Files that a folder picker gave: [{ path, file }]. */
export class FolderSource {
  constructor(files) {
    // "bundle/base/manifest.json" → "base/manifest.json": without the picked folder's own name.
    this.files = new Map(files.map(({ path, file }) => [path.split("/").slice(1).join("/"), file]));
  }

  /** As `HttpSource.read`. Throws DataError also if the file can no longer be read. */
  async read(path, limit, count = () => {}) {
    const file = this.files.get(path);
    if (!file) throw missing(path);
    if (file.size > limit) throw tooLong(path, limit);
    const why = "it was changed or removed after it was picked; pick the folder again";
    const content = await translated(() => file.arrayBuffer(), () => new DataError(`${path} cannot be read: ${why}`, fileName(path)));
    count(content.byteLength);
    return new Uint8Array(content);
  }

  async size(path) {
    return this.files.get(path)?.size ?? null;
  }

  async adapterNames() {
    const names = [...this.files.keys()].map((path) => /^adapters\/([^/]+)\.json$/.exec(path)?.[1]);
    return names.filter(Boolean).sort(byCodePoint);
  }
}

/** A file of the page's own origin, as `HttpSource.read`; more than `limit` bytes are refused before they are read. */
export async function fetched(url, path, limit, count = () => {}) {
  const response = await reached(path, fetch(url, REQUEST));
  if (response.status === 404) throw missing(path);
  if (!response.ok) throw new DataError(`${path} cannot be fetched: the server answers ${response.status}`, fileName(path));
  const [parts, reader] = [[], response.body.getReader()];
  let size = 0;
  for (let next = await reached(path, reader.read()); !next.done; next = await reached(path, reader.read())) {
    parts.push(next.value);
    size += next.value.length;
    if (size > limit) {
      await reader.cancel();
      throw tooLong(path, limit);
    }
    count(next.value.length);
  }
  return concat(...parts);
}

function reached(path, answer) {
  return translated(() => answer, () => {
    const why = globalThis.navigator?.onLine !== false
      ? "the server cannot be reached, or broke off; is it still running?"
      : "this browser is offline; connect it, or open a folder";
    return new DataError(`${path} cannot be fetched: ${why}`, fileName(path));
  });
}

const fileName = (path) => path.split("/").at(-1);
const missing = (path) => new DataError(`${path} is missing: copy the bundle again`, fileName(path));
const tooLong = (path, limit) =>
  new TrustError(`${path} is larger than its limit of ${limit} bytes: copy the bundle again`, fileName(path));
