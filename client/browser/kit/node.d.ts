import { FolderSource, Store } from "./index.js";

/** The bundle in a folder, as it is now. Links are left out. */
export function folder(path: string): Promise<FolderSource>;

/** Keeps accepted versions in a file, which one process uses at a time; lessons and the identity last as long as the process. */
export class FileStore extends Store {
  constructor(path: string);
}
