// Classifies phrases with a bundle that the app brings, and learns corrections. Bundle and keys are from `device web --export`.

import { Device, HttpSource } from "@edgeadapt/device";

const element = (id) => document.getElementById(id);
const here = new URL("./", location.href);
const source = new HttpSource(new URL("bundle/", here), new URL("bundle.json", here));

/** Do `work` while the buttons are disabled, and show what it says, or why it failed, in the element `id`. */
async function attempt(id, work) {
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  try {
    element(id).textContent = await work();
  } catch (error) {
    element(id).textContent = error.message;
  }
  for (const button of document.querySelectorAll("button")) button.disabled = !device;
}

let device;
let used; // the private adapter, once there is one

async function use({ adapters, learned }) {
  const [name] = learned.length ? learned : adapters.filter(({ manifest }) => manifest).map((adapter) => adapter.name);
  ({ name: used } = await device.use(name));
  const { manifest } = adapters.find((adapter) => adapter.name === name);
  element("label").replaceChildren(...manifest.labels.map((label) => new Option(label)));
  return `${used}, version ${manifest.version}`;
}

async function classify() {
  const { labels, says, milliseconds } = await device.classify(element("phrase").value, 1);
  const [best] = labels;
  return best ? `${best.label} ${Math.round(100 * best.probability)} % (${Math.round(milliseconds)} ms)` : says || "unknown text";
}

async function teach() {
  const taught = await device.teach(used, [{ text: element("phrase").value, label: element("label").value }]);
  element("status").textContent = await use(taught);
  return classify();
}

async function undo() {
  element("status").textContent = await use(await device.undo());
  return classify();
}

for (const [id, event, work] of [["ask", "submit", classify], ["correct", "submit", teach], ["undo", "click", undo]]) {
  element(id).addEventListener(event, (given) => {
    given.preventDefault();
    attempt("answer", work);
  });
}

await attempt("status", async () => {
  const keys = await (await fetch("trust.pem")).text(); // part of the app, as its code is
  device = await Device.open({ source, keys, provider: "wasm" });
  return use(await device.about());
});
