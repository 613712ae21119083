// A folder with trust.pem and bundle/, with some of its files changed: { PATH: TEXT | {"hex": HEX} | null }.

import { existsSync, readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

export class Folder {
  constructor(folder, changes = {}) {
    [this.folder, this.changes] = [folder, new Map(Object.entries(changes))];
  }

  /** The content of a file, or null without one. */
  read(path) {
    if (!this.changes.has(path)) return existsSync(join(this.folder, path)) ? readFileSync(join(this.folder, path)) : null;
    const change = this.changes.get(path);
    if (change === null) return null;
    return typeof change === "string" ? Buffer.from(change) : Buffer.from(change.hex, "hex");
  }

  /** The names in a folder. */
  list(path) {
    const within = [...this.changes.keys()].filter((each) => each.startsWith(`${path}/`));
    const names = [...readdirSync(join(this.folder, path)), ...within.map((each) => each.slice(path.length + 1))];
    return names.filter((name) => this.changes.get(`${path}/${name}`) !== null);
  }
}
