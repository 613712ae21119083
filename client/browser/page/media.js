// Files as texts, as edgeadapt/bases/media.py, pictures.py and sounds.py: a data URI of a small file, whose tokens are its pixels or the
// samples of a WAV file of 16 bits. A variant of one is its text with "#" and a number. Pictures are reduced or enlarged as Pillow does it (bilinear, across and then down), to the same numbers.

import { DataError, translated } from "./errors.js";

const MAX_MEDIUM = 2 ** 18; // characters
const MAX_KEPT = 2 ** 26; // bytes of decoded files in memory
const PICTURE = { noun: "picture", kinds: "PNG, JPEG or WebP", uri: /^data:image\/(png|jpeg|webp);base64,/ };
const MOST_SEEN = 1024; // pixels of a side
const ONE = 2 ** 22; // Pillow's weights are whole numbers of it
const SOUND = { noun: "sound", kinds: "WAV, FLAC, Ogg or MP3", uri: /^data:audio\/wav;base64,/ };
const MOST_VARIANTS = 16;
const [OCTAVES, NOISE, LOUDEST] = [8, 256 * 53_510, 2 ** 15 - 1]; // of a sound's noise, as in sounds.py
const HEADER = 44; // bytes of a WAV file
const LOWEST = 4000; // rate of a sound: below it, a file is a window of sensors
const MOST_CHANNELS = 64;
export const RATE = 16_000; // samples a second of what a file becomes
export const SECONDS = 5; // of it, at most

/** The most characters of a text, which may be a file, if it has at most `most` else. */
export const longest = (text, most) => (/^data:(image|audio)\//.test(text) ? MAX_MEDIUM : most);

/** The first variants of a file; a text has none. */
export function variants(text, count) {
  return /^data:(image|audio)\//.test(text) ? Array.from({ length: count }, (_, i) => `${text}#${i + 1}`) : [];
}

/** 32 bits that a seed draws for a place, by the murmur hash. */
function drawnBits(seed, place) {
  let bits = Math.imul(place, 0xc2b2ae3d) ^ seed;
  for (const [shift, factor] of [[16, 0x85ebca6b], [13, 0xc2b2ae35]]) bits = Math.imul(bits ^ (bits >>> shift), factor);
  return (bits ^ (bits >>> 16)) >>> 0;
}

const clipped = (value, low, high) => Math.min(Math.max(value, low), high);

/** Reads files as `Text` reads texts. They are decoded by `prepare`, before the others are called. */
export class Files {
  #kept = new Map(); // text → numbers, the last used ones last
  #size = 0;
  #kind;

  /** `kind`: `noun`, the `kinds` of files, and the form of a `uri`; `size`: numbers of each file. */
  constructor(kind, size) {
    this.#kind = kind;
    this.noun = kind.noun;
    this.limit = this.least = size;
  }

  /** What `check` says of the fields of tokenizer.json. Throws DataError: they are not whole numbers, or it says no. */
  static stated(noun, fields, check) {
    if (!Object.values(fields).every(Number.isInteger) || !check) {
      throw new DataError(`tokenizer.json states no size of ${noun}s: copy the base again`, "tokenizer.json");
    }
    return fields;
  }

  /** As of `Text`: nothing but the file. */
  readings(text) {
    return [text];
  }

  /** Decode texts. Throws DataError: one is of another kind, too large or damaged. */
  async prepare(texts) {
    for (const text of texts) {
      const numbers = this.#kept.get(text) ?? (await this.#read(text));
      if (!this.#kept.delete(text)) this.#size += numbers.byteLength;
      this.#kept.set(text, numbers);
    }
    for (const [oldest, { byteLength }] of this.#kept) {
      if (this.#size <= MAX_KEPT || texts.includes(oldest)) break;
      this.#kept.delete(oldest);
      this.#size -= byteLength;
    }
  }

  /** The numbers of a prepared text. Throws DataError. */
  phrase(text) {
    const numbers = this.#kept.get(text);
    if (!numbers) throw this.#foreign();
    return numbers;
  }

  tokens = (text) => this.phrase(text);
  unknownShare = () => 0;
  unread = () => 0;

  #foreign = () => new DataError(`this base reads ${this.noun}s: give ${this.#kind.kinds}`, this.noun);

  async #read(whole) {
    const { noun } = this;
    const [text, number] = whole.split("#");
    if (!this.#kind.uri.test(text)) throw this.#foreign();
    if (text.length > MAX_MEDIUM) {
      throw new DataError(`the ${noun} has ${text.length} characters, above the limit of ${MAX_MEDIUM}: reduce it`, noun);
    }
    const binary = translated(() => atob(text.slice(text.indexOf(",") + 1)), () => new DataError(`the ${noun} is not in base64`, noun));
    const tokens = await this.decoded(Uint8Array.from(binary, (char) => char.charCodeAt(0)));
    if (whole === text) return tokens;
    if (!Array.from({ length: MOST_VARIANTS }, (_, i) => `${text}#${i + 1}`).includes(whole)) {
      throw new DataError(`a ${noun} has no such variant`, noun);
    }
    const sum = tokens.reduce((total, token) => total + token, 0);
    return this.varied(tokens, (sum + number * 0x9e3779b1) | 0);
  }
}

export class Pixels extends Files {
  constructor({ model: { height, width, channels } }) {
    const sizes = [height, width].every((size) => size > 0 && size <= MOST_SEEN) && [1, 3].includes(channels);
    const stated = Files.stated(PICTURE.noun, { height, width, channels }, sizes);
    super(PICTURE, height * width * channels);
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

  varied(tokens, seed) {
    const { height, width, channels } = this;
    const [down, across, light] = [0, 1, 2].map((place) => drawnBits(seed, place));
    const moved = (size, bits) => Array.from({ length: size }, (_, at) => clipped(at + (bits % (2 * Math.floor(size / 10) + 1)) - Math.floor(size / 10), 0, size - 1));
    const [rows, columns] = [moved(height, down), moved(width, across)];
    return tokens.map((_, at) => {
      const [row, column] = [Math.floor(at / channels / width), Math.floor(at / channels) % width];
      const token = tokens[(rows[row] * width + columns[column]) * channels + (at % channels)];
      return Math.min((token * (205 + (light % 103))) >> 8, 255);
    });
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

/** The loudest of the parts of `length` samples, the first of them; all if they are no more. */
export function loudest(samples, length, channels = 1) {
  const moments = samples.length / channels;
  if (moments <= length) return samples;
  const energy = (moment) => {
    let sum = 0;
    for (let at = moment * channels; at < (moment + 1) * channels; at++) sum += samples[at] ** 2;
    return sum;
  };
  let [sum, most, begin] = [0, -1, 0];
  for (let moment = 0; moment < moments; moment++) {
    sum += energy(moment) - (moment < length ? 0 : energy(moment - length));
    if (moment >= length - 1 && sum > most) [most, begin] = [sum, moment - length + 1];
  }
  return samples.subarray(begin * channels, (begin + length) * channels);
}

/** A sound of samples, an Int16Array. */
export function signal(samples, rate, channels = 1) {
  const content = new Uint8Array(HEADER + 2 * samples.length);
  content.set(header(rate, channels, 2 * samples.length));
  const view = new DataView(content.buffer);
  samples.forEach((sample, at) => view.setInt16(HEADER + 2 * at, sample, true));
  const parts = Array.from({ length: Math.ceil(content.length / 2 ** 13) }, (_, at) => content.subarray(at * 2 ** 13, (at + 1) * 2 ** 13));
  return `data:audio/wav;base64,${btoa(parts.map((part) => String.fromCharCode(...part)).join(""))}`;
}

/** Whether the text of a sound's file states less than the rates of sounds. */
export function isWindow(text) {
  const rate = atob(text.slice(text.indexOf(",") + 33, text.indexOf(",") + 41));
  return new DataView(Uint8Array.from(rate, (char) => char.charCodeAt(0)).buffer).getUint32(0, true) < LOWEST;
}

/** The text of a window of sensors, if a file is one: what `signal` writes, below the rates of sounds. */
export function sensorWindow(bytes) {
  const size = bytes.length - HEADER;
  if (size < 2 || size % 2) return undefined;
  const view = new DataView(bytes.buffer);
  const [channels, rate] = [view.getUint16(22, true), view.getUint32(24, true)];
  const own = rate < LOWEST && channels <= MOST_CHANNELS && header(rate, channels, size).every((byte, at) => byte === bytes[at]);
  return own ? signal(new Int16Array(bytes.slice(HEADER).buffer), rate, channels) : undefined;
}

export class Samples extends Files {
  constructor({ model: { rate, length, channels } }) {
    const sound = Math.min(rate, length, channels) >= 1 && rate <= 48_000 && length <= 2 ** 17 && channels <= MOST_CHANNELS;
    const stated = Files.stated(SOUND.noun, { rate, length, channels }, sound);
    super(SOUND, length * channels);
    Object.assign(this, stated, { span: length });
  }

  decoded(bytes) {
    const { rate, span, channels } = this;
    const size = bytes.length - HEADER;
    if (size < 2 * channels || size % (2 * channels) || String.fromCharCode(...bytes.subarray(0, 4)) !== "RIFF") {
      throw new DataError("the sound is damaged: make it again from its file", "sound");
    }
    if (!header(rate, channels, size).every((byte, at) => byte === bytes[at])) {
      throw new DataError(`this base hears ${channels} channels at ${rate} Hz with 16 bits: convert the sound`, "sound");
    }
    const view = new DataView(bytes.buffer);
    const samples = Int16Array.from({ length: size / 2 }, (_, at) => view.getInt16(HEADER + 2 * at, true));
    const part = loudest(samples, span, channels);
    const whole = new Int16Array(span * channels);
    whole.set(part, channels * Math.floor((span - part.length / channels) / 2));
    return whole;
  }

  varied(tokens, seed) {
    const { span, channels } = this;
    const [moved, gain, level] = [0, 1, 2].map((place) => drawnBits(seed, place));
    const far = Math.floor(span / 10);
    const back = ((moved % (2 * far + 1)) - far + span) % span; // as numpy's roll
    const samples = Int32Array.from(tokens, (_, at) => {
      const sample = tokens[(at - back * channels + tokens.length) % tokens.length];
      return channels === 1 ? (sample * (128 + (gain % 257))) >> 8 : sample;
    });
    const sums = new Array(channels).fill(0);
    samples.forEach((sample, at) => (sums[at % channels] += Math.abs(sample)));
    const loud = sums.map((sum) => Math.floor(sum / span) * (14 + (level % 131)));
    return Int16Array.from(samples, (sample, at) => {
      const [moment, channel] = [Math.floor(at / channels), at % channels];
      let noise = 0;
      for (let octave = 0; octave < OCTAVES; octave++) {
        noise += (drawnBits(seed + octave + 1, (moment >> octave) * channels + channel + 3) & 0xffff) - 2 ** 15;
      }
      return clipped(sample + Math.floor((noise * loud[channel]) / NOISE), -LOUDEST, LOUDEST);
    });
  }
}

/** The one header that a sound has: PCM of `size` bytes. */
function header(rate, channels, size) {
  const view = new DataView(new ArrayBuffer(HEADER));
  const each = 2 * channels;
  ["RIFF", "WAVE", "fmt ", "data"].forEach((name, at) => [...name].forEach((char, i) => view.setUint8([0, 8, 12, 36][at] + i, char.charCodeAt(0))));
  for (const [at, number] of [[4, size + 36], [16, 16], [24, rate], [28, rate * each], [40, size]]) view.setUint32(at, number, true);
  for (const [at, number] of [[20, 1], [22, channels], [32, each], [34, 16]]) view.setUint16(at, number, true);
  return new Uint8Array(view.buffer);
}
