// The part of the page that classifies what it is given, and shows the most likely intents: a phrase, a picture of a file or the camera, or a
// sound of a file or the microphone. The last two take the place of the phrase as texts (media.js).

import { attempt, breakable, complain, create, element, leftOut, onSubmit, said, settle, words } from "./dom.js";
import { RATE, SECONDS, loudest, sensorWindow, signal } from "./media.js";

const TOP = 5;
const SIDE = 256; // pixels of a picture's longer side, as edgeadapt/bases/pictures.py
const LOSSLESS = 64 * 64; // pixels up to which it is PNG
const FIELDS = { text: "said", picture: "picture", sound: "sound" }; // what the base reads → the fields for it
const TITLES = { text: "Phrase", picture: "Picture", sound: "Sound" };

export class PhraseView {
  #asked = 0; // questions so far: an answer is shown only if no later question was asked
  #pending = 0; // switches to another adapter that have not ended
  #changed = false; // whether one of them has put another adapter in use
  #camera; // its stream, while it is used
  #recorder; // while it records

  constructor(client) {
    this.client = client;
    onSubmit("classify-form", () => this.#ask());
    const on = (id, event, work) => element(id).addEventListener(event, ({ target }) => attempt("phrase-error", () => work(target)));
    on("picture-file", "change", ({ files }) => this.#read(files[0]));
    on("camera", "click", () => this.#openOrClose());
    on("shoot", "click", () => this.#shoot());
    on("sound-file", "change", ({ files }) => this.#hear(files[0]));
    on("microphone", "click", () => this.#record());
  }

  /** Begin with another bundle. */
  show({ reads }) {
    this.#close();
    this.#recorder?.stop();
    for (const [kind, id] of Object.entries(FIELDS)) element(id).hidden = kind !== reads;
    element("classify-title").textContent = TITLES[reads];
    for (const id of ["phrase", "picture-file", "sound-file"]) element(id).value = "";
    element("heard").textContent = "";
    element("seen").hidden = true;
    this.#answer("", []);
    settle("phrase-error", element("phrase"));
  }

  /** Hide the answer of the adapter that is in use, while another one is put in use. */
  switching() {
    this.#pending += 1;
    this.#asked += 1;
    element("answer").dataset.stale = "yes";
  }

  /** After the last switch, ask for the same phrase again; if no adapter took another's place, show the old answer. */
  async switched(done) {
    this.#pending -= 1;
    this.#changed ||= done;
    if (this.#pending) return;
    if (this.#changed && element("phrase").value.trim()) await this.#ask();
    else if (this.#changed) this.#answer("", []);
    if (this.#pending) return;
    this.#changed = false;
    delete element("answer").dataset.stale;
  }

  async #ask() {
    const field = element("phrase");
    const [text, number] = [field.value, ++this.#asked];
    settle("phrase-error", field);
    try {
      const found = await this.client.classify(text, TOP);
      if (number === this.#asked) this.#answer(caption(text, found), found.labels, `${found.milliseconds.toFixed(1)} ms`);
    } catch (error) {
      if (number !== this.#asked) return;
      this.#answer("", []);
      complain("phrase-error", error, field);
    }
  }

  #answer(text, labels, title = "") {
    Object.assign(element("answer-caption"), { textContent: text, title });
    element("answers").replaceChildren(...labels.map(row));
  }

  /** Ask what a file is. */
  #submit(text) {
    element("phrase").value = text;
    element("classify-form").requestSubmit();
  }

  async #read(file) {
    if (!file) return;
    const image = await createImageBitmap(file).catch(() => {
      throw new Error("the file is no picture that this browser reads: choose a PNG, JPEG or WebP");
    });
    this.#take(image, image.width, image.height);
  }

  async #openOrClose() {
    if (this.#camera) return this.#close();
    const viewfinder = element("viewfinder");
    this.#camera = await streamOf("camera", { video: { facingMode: "environment" } });
    viewfinder.srcObject = this.#camera;
    await viewfinder.play();
    element("shoot").disabled = viewfinder.hidden = false;
    element("camera").textContent = "Close the camera";
  }

  #shoot() {
    const viewfinder = element("viewfinder");
    this.#take(viewfinder, viewfinder.videoWidth, viewfinder.videoHeight);
  }

  #close() {
    end(this.#camera);
    this.#camera = undefined;
    element("viewfinder").srcObject = null;
    element("shoot").disabled = element("viewfinder").hidden = true;
    element("camera").textContent = "Use the camera";
  }

  /** Draw an image, reduced, and ask what it is. */
  #take(image, width, height) {
    if (!width || !height) throw new Error("the camera shows nothing yet: try again");
    const share = Math.min(1, SIDE / Math.max(width, height));
    const seen = Object.assign(element("seen"), { hidden: false, width: Math.round(width * share), height: Math.round(height * share) });
    seen.getContext("2d").drawImage(image, 0, 0, seen.width, seen.height);
    const small = seen.width * seen.height <= LOSSLESS;
    this.#submit(small ? seen.toDataURL("image/png") : seen.toDataURL("image/jpeg", 0.9));
  }

  async #record() {
    if (this.#recorder) return this.#recorder.stop();
    const stream = await streamOf("microphone", { audio: true });
    const recorder = (this.#recorder = new MediaRecorder(stream, { audioBitsPerSecond: 256_000 }));
    const parts = [];
    recorder.addEventListener("dataavailable", ({ data }) => {
      element("heard").textContent = `Recording, at most ${SECONDS} s`;
      parts.push(data);
    });
    recorder.addEventListener("stop", () => {
      end(stream);
      this.#recorder = undefined;
      element("microphone").textContent = "Record";
      attempt("phrase-error", () => this.#hear(new Blob(parts)));
    });
    recorder.start(100);
    element("microphone").textContent = "Stop";
    setTimeout(() => recorder.state === "recording" && recorder.stop(), SECONDS * 1000);
  }

  /** Decode a file to one channel of `RATE`, unless it is a window of sensors, and ask what it is. */
  async #hear(file) {
    if (!file) return;
    const content = await file.arrayBuffer();
    const kept = sensorWindow(new Uint8Array(content));
    element("heard").textContent = kept ? "A window of sensors" : "";
    if (kept) return this.#submit(kept);
    const decoder = new OfflineAudioContext(1, 1, RATE);
    const heard = await decoder.decodeAudioData(content).catch(() => {
      throw new Error("the file is no sound that this browser reads: choose a WAV, FLAC, Ogg or MP3");
    });
    const channels = Array.from({ length: heard.numberOfChannels }, (_, at) => heard.getChannelData(at));
    const mean = channels[0].map((_, at) => channels.reduce((sum, channel) => sum + channel[at], 0) / channels.length);
    const samples = Int16Array.from(mean, (value) => Math.round(Math.max(-1, Math.min(1, value)) * 32767));
    const part = loudest(samples, SECONDS * RATE);
    element("heard").textContent = `A sound of ${(part.length / RATE).toFixed(1)} s`;
    this.#submit(signal(part, RATE));
  }
}

async function streamOf(noun, wanted) {
  const stream = await navigator.mediaDevices?.getUserMedia(wanted).catch(() => {});
  if (!stream) throw new Error(`the ${noun} cannot be used: allow it for this page, or choose a file`);
  return stream;
}

const end = (stream) => stream?.getTracks().forEach((track) => track.stop());

function caption(text, { adapter, unknown, unread, outcome, says }) {
  const share = unknown ? `, ${(100 * unknown).toFixed(0)} % of its tokens unknown to the base` : "";
  const rule = says ? ` ${says}` : outcome === "confirm" ? " To be confirmed." : "";
  return `${said(text)} with ${adapter}${share}.${leftOut(unread)}${rule}`;
}

function row({ label, probability }) {
  const shown = words(label);
  const meter = create("meter", { min: 0, max: 1, value: probability, "aria-label": shown });
  const cells = [create("td", {}, meter), create("td", {}, `${(100 * probability).toFixed(1)} %`)];
  return create("tr", { "data-probability": probability }, create("th", { scope: "row" }, ...breakable(shown)), ...cells);
}
