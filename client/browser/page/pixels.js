// Pictures as texts, whose tokens are their pixels, as edgeadapt/bases/pictures.py: a data URI of a small file. It is reduced or
// enlarged as Pillow does it (bilinear, across and then down), to the same numbers.

import { DataError } from "./errors.js";

const PICTURE = /^data:image\/(png|jpeg|webp);base64,/;
const MAX_PICTURE = 2 ** 18; // characters
const MOST_SEEN = 1024; // pixels of a side
const MAX_KEPT = 2 ** 26; // bytes of pixels in memory
const ONE = 2 ** 22; // Pillow's weights are whole numbers of it
const KINDS = "this base reads pictures: give PNG, JPEG or WebP";

/** Whether a tokenizer.json states pictures. */
export const isOfPictures = ({ model }) => model?.type === "Pixels";

/** Reads pictures as `Text` reads texts. They are decoded by `prepare`, before the others are called. */
export class Pixels {
  #kept = new Map(); // picture → pixels, the last used ones last
  #size = 0;

  constructor({ model: { height, width, channels } }) {
    const isSize = (size) => Number.isInteger(size) && size > 0 && size <= MOST_SEEN;
    if (![height, width].every(isSize) || ![1, 3].includes(channels)) {
      throw new DataError("tokenizer.json states no size of pictures: copy the base again", "tokenizer.json");
    }
    Object.assign(this, { height, width, channels });
    this.limit = this.least = height * width * channels;
  }

  /** Decode pictures. Throws DataError: one is none, too large or damaged. */
  async prepare(pictures) {
    for (const picture of pictures) {
      const pixels = this.#kept.get(picture) ?? (await this.#decoded(picture));
      if (!this.#kept.delete(picture)) this.#size += pixels.length;
      this.#kept.set(picture, pixels);
    }
    for (const [oldest, { length }] of this.#kept) {
      if (this.#size <= MAX_KEPT || pictures.includes(oldest)) break;
      this.#kept.delete(oldest);
      this.#size -= length;
    }
  }

  /** The pixels of a prepared picture. Throws DataError. */
  phrase(picture) {
    const pixels = this.#kept.get(picture);
    if (!pixels) throw new DataError(KINDS, "picture");
    return pixels;
  }

  tokens = (picture) => this.phrase(picture);
  unknownShare = () => 0;
  unread = () => 0;

  async #decoded(picture) {
    if (!PICTURE.test(picture)) throw new DataError(KINDS, "picture");
    if (picture.length > MAX_PICTURE) {
      throw new DataError(`the picture has ${picture.length} characters, above the limit of ${MAX_PICTURE}: reduce it`, "picture");
    }
    if (typeof createImageBitmap !== "function") throw new DataError("this runtime decodes no pictures: use a browser", "picture");
    let image;
    try {
      const bytes = Uint8Array.from(atob(picture.slice(picture.indexOf(",") + 1)), (char) => char.charCodeAt(0));
      image = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none" });
    } catch {
      throw new DataError("the picture is damaged, or neither PNG, JPEG nor WebP", "picture");
    }
    const { width, height } = image;
    if (width * height > MOST_SEEN ** 2) throw new DataError(`the picture has ${width} x ${height} pixels: reduce it`, "picture");
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return this.#fitted(context.getImageData(0, 0, width, height).data, width, height);
  }

  #fitted(rgba, width, height) {
    const bands = this.channels === 1 ? [grey(rgba)] : [0, 1, 2].map((band) => rgba.filter((_, i) => i % 4 === band));
    const ratio = this.width / this.height;
    const [across, down] = width / height >= ratio ? [ratio * height, height] : [width, width / ratio];
    const columns = weights(width, (width - across) / 2, (width - across) / 2 + across, this.width);
    const rows = weights(height, (height - down) / 2, (height - down) / 2 + down, this.height);
    const pixels = new Uint8Array(this.limit);
    bands.forEach((values, band) => {
      const narrow = resized(values, columns, height, (x, y) => y * width + x, (x, y) => y * this.width + x);
      const small = resized(narrow, rows, this.width, (y, x) => y * this.width + x, (y, x) => y * this.width + x);
      small.forEach((value, i) => (pixels[i * this.channels + band] = value));
    });
    return pixels;
  }
}

const grey = (rgba) =>
  Uint8Array.from({ length: rgba.length / 4 }, (_, i) => (19595 * rgba[4 * i] + 38470 * rgba[4 * i + 1] + 7471 * rgba[4 * i + 2] + 32768) >> 16);

/** What each of `count` pixels is made of: [{ from, of }], the first one that is read, and the weight of each; none if nothing changes. */
function weights(size, begin, end, count) {
  const [first, last] = [begin, end].map(Math.fround); // Pillow's are single
  if (!first && last === size && count === size) return null;
  const scale = Math.fround(last - first) / count;
  const support = Math.max(scale, 1);
  return Array.from({ length: count }, (_, at) => {
    const center = first + (at + 0.5) * scale;
    const from = Math.max(0, Math.trunc(center - support + 0.5));
    const beyond = Math.min(size, Math.trunc(center + support + 0.5));
    const near = Array.from({ length: beyond - from }, (_, i) => Math.max(0, 1 - Math.abs((from + i - center + 0.5) * (1 / support))));
    const share = 1 / near.reduce((total, each) => total + each, 0);
    return { from, of: near.map((each) => Math.trunc(each * share * ONE + 0.5)) };
  });
}

/** Values in another number along one side; `read` and `write` are the places of (along, across). */
function resized(values, along, across, read, write) {
  if (!along) return values;
  const result = new Uint8Array(along.length * across);
  along.forEach(({ from, of }, at) => {
    for (let other = 0; other < across; other++) {
      const sum = of.reduce((total, weight, i) => total + weight * values[read(from + i, other)], ONE / 2);
      result[write(at, other)] = Math.min(255, Math.floor(sum / ONE));
    }
  });
  return result;
}
