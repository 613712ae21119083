// Sounds as texts, as edgeadapt/bases/sounds.py: a WAV file of 16 bits, whose tokens are its samples.

import { DataError } from "./errors.js";
import { Files } from "./media.js";

const HEADER = 44; // bytes
const KIND = { noun: "sound", kinds: "WAV, FLAC, Ogg or MP3", uri: /^data:audio\/wav;base64,/ };
export const RATE = 16_000; // samples a second of what a file becomes
export const SECONDS = 5; // of it, at most

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

export class Samples extends Files {
  constructor({ model: { rate, length, channels } }) {
    const sound = Math.min(rate, length, channels) >= 1 && rate <= 48_000 && length <= 2 ** 17 && channels <= 64;
    const stated = Files.stated(KIND.noun, { rate, length, channels }, sound);
    super(KIND, length * channels);
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
