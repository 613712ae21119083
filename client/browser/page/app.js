// The page: passes the user's requests to the worker and shows its answers.

import { Client } from "./client.js";

const BARE = ""; // engine.js: the base without an adapter
const TOP = 5;
const element = (id) => document.getElementById(id);
const client = new Client();
let generates = false; // whether the open bundle generates text

function show(state, text) {
  element("status").dataset.state = state;
  element("status").textContent = text;
}

/** Run `action`. An error is shown in the status line, and nothing else changes. */
async function guarded(action) {
  try {
    return await action();
  } catch (error) {
    show("bad", error.message);
    return undefined;
  }
}

async function open(options) {
  show("busy", "Verifying and loading the bundle …");
  const start = performance.now();
  const bundle = await client.open(options);
  generates = bundle.task === "text-generation";
  element("facts").replaceChildren(...facts(bundle).flatMap(([term, value]) => [create("dt", term), create("dd", value)]));
  element("classify").hidden = generates;
  element("generate").hidden = !generates;
  element("chat-choice").hidden = !bundle.chat;
  element("answers").replaceChildren();
  for (const id of ["answer-caption", "generated", "speed"]) element(id).textContent = "";
  listAdapters(bundle.adapters);
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  show("good", `A pinned key signed the base. Ready after ${seconds} s.`);
  await choose(defaultAdapter(bundle.adapters));
}

const facts = ({ task, profile, base, threads }) => [
  ["Task", task],
  ["Profile", profile],
  ["Base", base.slice(0, 16)],
  ["Threads", String(threads)],
];

/** As Library.default in client/inference/library.py: the personal adapter, else the global one, else the first. */
function defaultAdapter(adapters) {
  const usable = adapters.filter(({ manifest }) => manifest);
  const personal = usable.filter(({ manifest }) => manifest.parent !== null);
  const candidates = [personal, usable.filter(({ name }) => name === "global"), usable];
  return candidates.find((found) => found.length)?.[0].name ?? (generates ? BARE : undefined);
}

function listAdapters(adapters) {
  const choices = adapters.map(({ name, manifest, refused }) => choice(name, name, refused ?? described(manifest), refused));
  if (generates) choices.push(choice(BARE, "none", "the base alone"));
  element("adapters").replaceChildren(element("adapters").firstElementChild, ...choices);
}

function choice(name, title, text, refused) {
  const label = create("label", "");
  label.className = "adapter";
  const radio = Object.assign(document.createElement("input"), { type: "radio", name: "adapter", value: name });
  radio.disabled = Boolean(refused);
  radio.addEventListener("change", () => choose(name));
  const note = create("small", text);
  if (refused) note.className = "refused";
  label.append(radio, create("strong", title), note);
  return label;
}

function described({ parent, version, format, rank, labels, size }) {
  const kind = parent === null ? "global" : "personal";
  const count = labels.length ? `, ${labels.length} labels` : "";
  return `${kind}, version ${version}, ${format}, rank ${rank}${count}, ${size.toLocaleString("en")} bytes`;
}

let used; // the adapter in use, which is kept when another is refused

async function choose(name) {
  if (name === undefined) return;
  client.stop(); // the text that is being generated is another adapter's
  const done = await guarded(() => client.use(name));
  if (done) {
    used = name;
    show("good", `${inUse(name)}; the switch took ${done.milliseconds.toFixed(2)} ms.`);
  }
  for (const radio of element("adapters").querySelectorAll("input")) radio.checked = radio.value === used;
  if (done && !generates && element("phrase").value.trim()) await classify();
}

const inUse = (name) => `${name === BARE ? "No adapter" : `Adapter ${name}`} is in use`;

async function classify() {
  const text = element("phrase").value;
  const found = await guarded(() => client.rank(text, TOP));
  if (!found) return;
  if (element("status").dataset.state === "bad") show("good", `${inUse(found.adapter)}.`);
  element("answer-caption").textContent = `“${text}” with ${found.adapter}, ${found.milliseconds.toFixed(1)} ms`;
  element("answers").replaceChildren(...found.labels.map(answerRow));
}

function answerRow({ label, probability }) {
  const meter = Object.assign(document.createElement("meter"), { min: 0, max: 1, value: probability });
  meter.setAttribute("aria-label", label);
  const cells = [create("td", label), create("td", ""), create("td", `${(100 * probability).toFixed(1)} %`)];
  cells[1].append(meter);
  const row = document.createElement("tr");
  row.dataset.probability = probability;
  row.append(...cells);
  return row;
}

async function generate() {
  const number = (id) => Number(element(id).value);
  const options = {
    prompt: element("prompt").value,
    chat: element("chat").checked,
    maxTokens: number("max-tokens"),
    temperature: number("temperature"),
    topP: number("top-p"),
    seed: number("seed"),
  };
  element("generated").textContent = element("speed").textContent = "";
  [element("generate-button").disabled, element("stop").disabled] = [true, false];
  const add = ({ text }) => element("generated").append(text);
  const done = await guarded(() => client.generate(options, add));
  [element("generate-button").disabled, element("stop").disabled] = [false, true];
  if (!done) return;
  if (element("status").dataset.state === "bad") show("good", `${inUse(used)}.`);
  element("speed").textContent = speed(done);
}

function speed({ tokens, first, milliseconds, stopped }) {
  const rate = tokens > 1 ? `, then ${((1000 * (tokens - 1)) / (milliseconds - first)).toFixed(1)} tokens/s` : "";
  return `${tokens} tokens${stopped ? " (stopped)" : ""}, the first after ${first.toFixed(0)} ms${rate}`;
}

function create(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

async function openPicked() {
  const [files, pem] = [element("folder").files, element("pem").files[0]];
  if (!files.length) return show("bad", "no folder is picked; pick the folder of a bundle");
  return guarded(async () => open({ files: [...files].map(picked), pem: await pem?.text() }));
}

// A worker receives the file without its path.
const picked = (file) => ({ path: file.webkitRelativePath, file });

element("open-folder").addEventListener("click", openPicked);
element("open-served").addEventListener("click", () => guarded(() => open({})));
element("stop").addEventListener("click", () => client.stop());
element("classify-form").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
element("generate-form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});

await guarded(() => open({}));
document.documentElement.dataset.ready = "yes";
