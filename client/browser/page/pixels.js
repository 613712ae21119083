// Pictures as texts, whose tokens are their pixels, as edgeadapt/bases/pictures.py. They are reduced or enlarged as Pillow does it (bilinear, across and then down), to the same numbers.

import { DataError } from "./errors.js";
import { Files } from "./media.js";

const KIND = { noun: "picture", kinds: "PNG, JPEG or WebP", uri: /^data:image\/(png|jpeg|webp);base64,/ };
const MOST_SEEN = 1024; // pixels of a side
const ONE = 2 ** 22; // Pillow's weights are whole numbers of it

export class Pixels extends Files {
  constructor({ model: { height, width, channels } }) {
    const sizes = [height, width].every((size) => size > 0 && size <= MOST_SEEN) && [1, 3].includes(channels);
    const stated = Files.stated(KIND.noun, { height, width, channels }, sizes);
    super(KIND, height * width * channels);
    Object.assign(this, stated);
  }

  async decoded(bytes) {
    if (typeof createImageBitmap !== "function") throw new DataError("this runtime decodes no pictures: use a browser", "picture");
    const image = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none" }).catch(() => {
      throw new DataError("the picture is damaged, or neither PNG, JPEG nor WebP", "picture");
    });
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
