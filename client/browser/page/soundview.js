// The part of the page that takes a sound, of a file or the microphone, and puts it in place of a phrase.

import { attempt, element } from "./dom.js";
import { loudest, RATE, SECONDS, signal } from "./samples.js";

export class SoundView {
  #recorder; // while it records

  constructor() {
    element("sound-file").addEventListener("change", ({ target }) => this.#work(() => this.#take(target.files[0])));
    element("microphone").addEventListener("click", () => this.#work(() => this.#record()));
  }

  /** Begin with another bundle, of sounds or not. */
  show({ reads }) {
    this.#recorder?.stop();
    element("sound").hidden = reads !== "sound";
    element("sound-file").value = element("heard").textContent = "";
  }

  #work(work) {
    return attempt("phrase-error", work, () => {});
  }

  async #record() {
    if (this.#recorder) return this.#recorder.stop();
    const stream = await navigator.mediaDevices?.getUserMedia({ audio: true }).catch(() => {});
    if (!stream) throw new Error("the microphone cannot be used: allow it for this page, or choose a file");
    const recorder = (this.#recorder = new MediaRecorder(stream, { audioBitsPerSecond: 256_000 }));
    const parts = [];
    recorder.addEventListener("dataavailable", ({ data }) => {
      element("heard").textContent = `Recording, at most ${SECONDS} s`;
      parts.push(data);
    });
    recorder.addEventListener("stop", () => {
      for (const track of stream.getTracks()) track.stop();
      this.#recorder = undefined;
      element("microphone").textContent = "Record";
      this.#work(() => this.#take(new Blob(parts)));
    });
    recorder.start(100);
    element("microphone").textContent = "Stop";
    setTimeout(() => recorder.state === "recording" && recorder.stop(), SECONDS * 1000);
  }

  /** Decode a file to one channel of `RATE`, and ask what it is. */
  async #take(file) {
    if (!file) return;
    const decoder = new OfflineAudioContext(1, 1, RATE);
    const heard = await decoder.decodeAudioData(await file.arrayBuffer()).catch(() => {
      throw new Error("the file is no sound that this browser reads: choose a WAV, FLAC, Ogg or MP3");
    });
    const channels = Array.from({ length: heard.numberOfChannels }, (_, at) => heard.getChannelData(at));
    const mean = channels[0].map((_, at) => channels.reduce((sum, channel) => sum + channel[at], 0) / channels.length);
    const samples = Int16Array.from(mean, (value) => Math.round(Math.max(-1, Math.min(1, value)) * 32767));
    const part = loudest(samples, SECONDS * RATE);
    element("phrase").value = signal(part, RATE);
    element("heard").textContent = `A sound of ${(part.length / RATE).toFixed(1)} s`;
    element("classify-form").requestSubmit();
  }
}
