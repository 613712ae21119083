// What the package has for Node: the files of a folder, and a store that keeps accepted versions in a file.

import { readdir, readFile, rename, stat, writeFile } from "node:fs/promises";
import { join, relative } from "node:path";
import { FolderSource, Store, TrustError } from "./index.js";

const VERSIONS = "versions";

/** The bundle in a folder, as it is now, as a source for `Device.open`. Links are left out. */
export async function folder(path) {
  const entries = await readdir(path, { recursive: true, withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile()).map(async ({ parentPath, path: older, name }) => {
    const full = join(parentPath ?? older, name);
    const file = { size: (await stat(full)).size, arrayBuffer: () => readFile(full) };
    return { path: join("bundle", relative(path, full)).replaceAll("\\", "/"), file };
  });
  return new FolderSource(await Promise.all(files));
}

/** Keeps accepted versions in a file, which one process uses at a time; lessons and the identity last as long as the process. */
export class FileStore extends Store {
  constructor(path) {
    super();
    this.path = path;
  }

  async read(store) {
    if (store !== VERSIONS) return super.read(store);
    const text = await readFile(this.path, "utf8").catch((error) => {
      if (error.code === "ENOENT") return "{}";
      throw error;
    });
    try {
      return new Map(Object.entries(JSON.parse(text)));
    } catch {
      throw new TrustError(`${this.path} is damaged; delete it only if you trust the bundle`, "seen");
    }
  }

  async write(store, records) {
    if (store !== VERSIONS) return super.write(store, records);
    await writeFile(`${this.path}.new`, JSON.stringify(Object.fromEntries(records)), { flush: true });
    await rename(`${this.path}.new`, this.path);
  }
}
