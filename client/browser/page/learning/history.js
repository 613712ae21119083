// What a person taught this browser: the adapters that it made, the corrections, and the adapters before the last lessons,
// as client/learning/corrections.py. There is one record for each base and set of pinned keys, replaced as a whole:
//
//   key       CryptoKeyPair of Ed25519 that signs the adapters; no script can read its private half; null at first
//   adapters  name → { manifest, blob }, the bytes of an adapter's two files
//   kept      [{ text, label }], corrections of lessons that cannot be undone any more, oldest first
//   lessons   [{ name, corrections, before: { manifest, blob } or null }], oldest first

import { DataError, TrustError } from "../errors.js";
import { publicKeyOf } from "../keys.js";
import { BROWSER, LEARNED } from "../storage.js";

const MAX_LESSONS = 8; // that can be undone
const MAX_CORRECTIONS = 512; // that are kept; the oldest are dropped
const EMPTY = { key: null, adapters: {}, kept: [], lessons: [] };

/** The stored record. It is a source of adapters, as those of sources.js. */
export class History {
  /** `place` names the base and the set of pinned keys. */
  constructor(place, store = BROWSER) {
    [this.place, this.store] = [place, store];
  }

  /** The record. Throws ConfigError: the browser does not store. TrustError: what is stored is damaged. */
  async load() {
    const [found = EMPTY] = await this.store.transact(LEARNED, [this.place]);
    if (found.adapters && Array.isArray(found.kept) && Array.isArray(found.lessons)) return found;
    throw new TrustError("what was learned is damaged; clear the page's data to start anew", LEARNED);
  }

  /** Replace the record. Throws ConfigError: it cannot be stored; the one before stays. */
  async save(record) {
    await this.store.transact(LEARNED, [], () => [[this.place, record]]);
  }

  async adapterNames() {
    return Object.keys((await this.load()).adapters);
  }

  /** The public keys that sign what was learned here: one, or none. */
  async keys() {
    const { key } = await this.load();
    return key ? [await publicKeyOf(key)] : [];
  }

  /** The bytes of a file, `adapters/NAME.json` or `adapters/NAME.onnx_adapter`. Throws DataError: it is not there. */
  async read(path) {
    const [, name, kind] = /^adapters\/(.+)\.(json|onnx_adapter)$/.exec(path) ?? [];
    const files = Object.entries((await this.load()).adapters).find(([each]) => each === name)?.[1];
    if (!files) throw new DataError(`${path} is missing: it was learned in this browser, and undone`, path.split("/").at(-1));
    return kind === "json" ? files.manifest : files.blob;
  }
}

/** All corrections of a record, oldest first; of a text that was corrected twice, the newest. */
export function corrections({ kept, lessons }) {
  const every = [...kept, ...lessons.flatMap((lesson) => lesson.corrections)];
  return [...new Map(every.map((one) => [one.text, one])).values()];
}

/** The record with one more lesson; of the oldest one, if it is one too many, only the corrections are kept. */
export function withLesson(record, lesson, files) {
  const lessons = [...record.lessons, lesson];
  const dropped = lessons.splice(0, Math.max(0, lessons.length - MAX_LESSONS));
  const kept = [...record.kept, ...dropped.flatMap((old) => old.corrections)].slice(-MAX_CORRECTIONS);
  return { ...record, kept, lessons, adapters: { ...record.adapters, [lesson.name]: files } };
}

/** The last lesson, and the record without it. Throws DataError: none is left. */
export function withoutLesson(record) {
  const lesson = record.lessons.at(-1);
  if (!lesson) throw new DataError("there is nothing to undo: no lesson is left", "undo");
  const { [lesson.name]: _, ...adapters } = record.adapters;
  return { lesson, record: { ...record, adapters, lessons: record.lessons.slice(0, -1) } };
}
