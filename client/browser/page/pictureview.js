// The part of the page that takes a picture, of a file or the camera, and puts it in place of a phrase.

import { attempt, complain, element } from "./dom.js";

const SIDE = 256; // pixels of the longer side, as edgeadapt/bases/pictures.py
const LOSSLESS = 64 * 64; // pixels up to which it is PNG

export class PictureView {
  #stream; // of the camera, while it is used

  constructor() {
    element("picture-file").addEventListener("change", ({ target }) => this.#work(() => this.#read(target.files[0])));
    element("camera").addEventListener("click", () => this.#work(() => this.#camera()));
    element("shoot").addEventListener("click", () => this.#work(() => this.#shoot()));
  }

  /** Begin with another bundle, of pictures or not. */
  show({ reads }) {
    this.#close();
    element("picture").hidden = reads !== "picture";
    element("said").hidden = reads !== "text";
    element("classify-title").textContent = { picture: "Picture", sound: "Sound", text: "Phrase" }[reads];
    element("phrase").value = element("picture-file").value = "";
    element("seen").hidden = true;
  }

  #work(work) {
    return attempt("phrase-error", work, () => {});
  }

  async #read(file) {
    if (!file) return;
    const image = await createImageBitmap(file).catch(() => {
      throw new Error("the file is no picture that this browser reads: choose a PNG, JPEG or WebP");
    });
    this.#take(image, image.width, image.height);
  }

  async #camera() {
    if (this.#stream) return this.#close();
    const viewfinder = element("viewfinder");
    this.#stream = await navigator.mediaDevices?.getUserMedia({ video: { facingMode: "environment" } }).catch(() => {});
    if (!this.#stream) throw new Error("the camera cannot be used: allow it for this page, or choose a file");
    viewfinder.srcObject = this.#stream;
    await viewfinder.play();
    element("shoot").disabled = viewfinder.hidden = false;
    element("camera").textContent = "Close the camera";
  }

  #shoot() {
    const viewfinder = element("viewfinder");
    this.#take(viewfinder, viewfinder.videoWidth, viewfinder.videoHeight);
  }

  #close() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#stream = undefined;
    element("viewfinder").srcObject = null;
    element("shoot").disabled = element("viewfinder").hidden = true;
    element("camera").textContent = "Use the camera";
  }

  /** Draw an image, reduced, and ask what it is. */
  #take(image, width, height) {
    if (!width || !height) return complain("phrase-error", new Error("the camera shows nothing yet: try again"));
    const share = Math.min(1, SIDE / Math.max(width, height));
    const seen = Object.assign(element("seen"), { hidden: false, width: Math.round(width * share), height: Math.round(height * share) });
    seen.getContext("2d").drawImage(image, 0, 0, seen.width, seen.height);
    const small = seen.width * seen.height <= LOSSLESS;
    element("phrase").value = small ? seen.toDataURL("image/png") : seen.toDataURL("image/jpeg", 0.9);
    element("classify-form").requestSubmit();
  }
}
