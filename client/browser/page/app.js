// The page: shows what the worker found, and passes on what the user does.

import { Client } from "./client.js";

const BARE = ""; // engine.js: the base without an adapter
const TOP = 5;
const element = (id) => document.getElementById(id);
const client = new Client();
let writes = false; // whether the open bundle generates text

function show(state, text) {
  element("status").dataset.state = state;
  element("status").textContent = text;
}

/** Run `action`; an error becomes the page's status line, and everything stays as it was. */
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
  writes = bundle.task === "text-generation";
  element("facts").replaceChildren(...facts(bundle).flatMap(([term, value]) => [made("dt", term), made("dd", value)]));
  element("classify").hidden = writes;
  element("write").hidden = !writes;
  element("chat-choice").hidden = !bundle.chat;
  element("answers").replaceChildren();
  element("asked").textContent = element("written").textContent = element("pace").textContent = "";
  listAdapters(bundle.adapters);
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  show("good", `The base is what a pinned key signed. Ready after ${seconds} s.`);
  await choose(favourite(bundle.adapters));
}

const facts = ({ task, profile, base, threads }) => [
  ["Task", task],
  ["Profile", profile],
  ["Base", base.slice(0, 16)],
  ["Threads", String(threads)],
];

/** As client/inference/session.py: the private adapter, else the shared one, else the only one. */
function favourite(adapters) {
  const sound = adapters.filter((row) => row.sidecar);
  const kinds = [sound.filter((row) => row.sidecar.parent !== null), sound.filter((row) => row.name === "global"), sound];
  return kinds.find((rows) => rows.length)?.[0].name ?? (writes ? BARE : undefined);
}

function listAdapters(adapters) {
  const rows = adapters.map(({ name, sidecar, refused }) => choice(name, name, refused ?? described(sidecar), refused));
  if (writes) rows.push(choice(BARE, "none", "the base alone"));
  element("adapters").replaceChildren(element("adapters").firstElementChild, ...rows);
}

function choice(name, title, text, refused) {
  const row = made("label", "");
  row.className = "adapter";
  const radio = Object.assign(document.createElement("input"), { type: "radio", name: "adapter", value: name });
  radio.disabled = Boolean(refused);
  radio.addEventListener("change", () => choose(name));
  const note = made("small", text);
  if (refused) note.className = "refused";
  row.append(radio, made("strong", title), note);
  return row;
}

function described({ parent, version, format, rank, labels, size }) {
  const kind = parent === null ? "shared" : "private";
  const intents = labels.length ? `, ${labels.length} intents` : "";
  return `${kind}, version ${version}, ${format}, rank ${rank}${intents}, ${size.toLocaleString("en")} bytes`;
}

let used; // the adapter in use, to go back to when another is refused

async function choose(name) {
  if (name === undefined) return;
  client.stop(); // a text that is being written is another adapter's
  const done = await guarded(() => client.use(name));
  if (done) {
    used = name;
    show("good", `${inUse(name)}; switching took ${done.milliseconds.toFixed(2)} ms.`);
  }
  for (const radio of element("adapters").querySelectorAll("input")) radio.checked = radio.value === used;
  if (done && !writes && element("phrase").value.trim()) await ask();
}

const inUse = (name) => `${name === BARE ? "No adapter" : `Adapter ${name}`} is in use`;

async function ask() {
  const text = element("phrase").value;
  const found = await guarded(() => client.rank(text, TOP));
  if (!found) return;
  if (element("status").dataset.state === "bad") show("good", `${inUse(found.adapter)}.`);
  element("asked").textContent = `“${text}” with ${found.adapter}, ${found.milliseconds.toFixed(1)} ms`;
  element("answers").replaceChildren(...found.labels.map(row));
}

function row({ label, probability }) {
  const meter = Object.assign(document.createElement("meter"), { min: 0, max: 1, value: probability });
  meter.setAttribute("aria-label", label);
  const cells = [made("td", label), made("td", ""), made("td", `${(100 * probability).toFixed(1)} %`)];
  cells[1].append(meter);
  const line = document.createElement("tr");
  line.dataset.probability = probability;
  line.append(...cells);
  return line;
}

async function write() {
  const number = (id) => Number(element(id).value);
  const options = {
    prompt: element("prompt").value,
    chat: element("chat").checked,
    maxTokens: number("tokens"),
    temperature: number("temperature"),
    topP: number("top-p"),
    seed: number("seed"),
  };
  element("written").textContent = element("pace").textContent = "";
  [element("start").disabled, element("stop").disabled] = [true, false];
  const add = ({ text }) => element("written").append(text);
  const done = await guarded(() => client.generate(options, add));
  [element("start").disabled, element("stop").disabled] = [false, true];
  if (!done) return;
  if (element("status").dataset.state === "bad") show("good", `${inUse(used)}.`);
  element("pace").textContent = pace(done);
}

function pace({ tokens, first, milliseconds, stopped }) {
  const rate = tokens > 1 ? `, then ${((1000 * (tokens - 1)) / (milliseconds - first)).toFixed(1)} tokens/s` : "";
  return `${tokens} tokens${stopped ? " (stopped)" : ""}, the first after ${first.toFixed(0)} ms${rate}`;
}

function made(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

async function openPicked() {
  const [files, pem] = [element("folder").files, element("pem").files[0]];
  if (!files.length) return show("bad", "no folder is picked; pick the bundle's");
  return guarded(async () => open({ files: [...files].map(picked), pem: await pem?.text() }));
}

// The path of a picked file does not survive the way to a worker.
const picked = (file) => ({ path: file.webkitRelativePath, file });

element("open-folder").addEventListener("click", openPicked);
element("open-served").addEventListener("click", () => guarded(() => open({})));
element("stop").addEventListener("click", () => client.stop());
element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
element("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});

await guarded(() => open({}));
document.documentElement.dataset.ready = "yes";
