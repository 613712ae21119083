// The page: opens a bundle, and connects its parts, the files *view.js.

import { AdapterView } from "./adapterview.js";
import { ChatView } from "./chatview.js";
import { Client } from "./client.js";
import { complain, element, settle, showFacts } from "./dom.js";
import { LearnView } from "./learnview.js";
import { ParticipationView } from "./participationview.js";
import { PhraseView } from "./phraseview.js";

const provider = new URLSearchParams(location.search).get("provider") ?? undefined; // ?provider=webgpu or wasm
const client = new Client();
const phrase = new PhraseView(client);
const chat = new ChatView(client, () => adapters.inUse?.name, (message, answer) => learn.correct(message, answer));
const adapters = new AdapterView(client, {
  switching: () => answering().switching(),
  switched: (done) => {
    learn.switched(adapters.inUse);
    return answering().switched?.(done);
  },
});
const learn = new LearnView(client, (found, name) => adapters.show(found, false, name));
const participation = new ParticipationView(client);
let generates = false; // whether the open bundle generates text

const answering = () => (generates ? chat : phrase);

function show(state, text) {
  element("status").setAttribute("role", state === "bad" ? "alert" : "status");
  element("status").dataset.state = state;
  element("status").textContent = text;
}

async function open(options) {
  show("busy", "Verifying and loading the bundle …");
  const start = performance.now();
  let bundle;
  try {
    bundle = await client.open({ ...options, provider }, progress);
  } finally {
    element("progress").hidden = true;
  }
  generates = bundle.task === "text-generation";
  showFacts("facts", facts(bundle));
  element("work").hidden = false;
  element("classify").hidden = generates;
  element("generate").hidden = !generates;
  phrase.show(bundle);
  if (generates) chat.show(bundle);
  learn.show(bundle);
  await participation.show(bundle);
  await adapters.show(bundle.adapters, generates);
  show("good", `A pinned key signed the base. Ready after ${((performance.now() - start) / 1000).toFixed(1)} s.`);
}

function progress({ received, total, starting }) {
  const bar = element("progress");
  bar.hidden = false;
  if (starting) {
    bar.removeAttribute("value");
    return show("busy", "All files of the base are verified. Starting the model …");
  }
  if (total) bar.value = received / total;
  else bar.removeAttribute("value");
  const of = total ? ` of ${megabytes(total)}` : "";
  return show("busy", `Reading and verifying the base: ${megabytes(received)}${of} MB`);
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

const facts = ({ task, profile, base, runsOn, context }) => ({
  ...{ Task: task, Profile: profile, Base: base.slice(0, 16), "Runs on": runsOn },
  ...(context ? { Context: `${context.toLocaleString("en")} tokens` } : {}),
});

async function begin() {
  try {
    await open({});
    keepCopy(); // only of what was verified
  } catch (error) {
    show("bad", error.message);
    element("another").open = true; // another bundle, other keys, or the same once more
  }
}

/** Open what the user asks for. A refusal is shown next to the buttons, and what was open stays open. */
async function reopen(options) {
  const { state } = element("status").dataset;
  const before = [state, element("status").textContent];
  settle("bundle-error");
  client.stop(); // the text that is being written
  try {
    const asked = await options();
    await open(asked);
    if (!asked.files) keepCopy();
  } catch (error) {
    show(...before);
    complain("bundle-error", error);
  }
}

async function picked() {
  const [files, pem] = [element("folder").files, element("pem").files[0]];
  if (!files.length) throw new Error("no folder is picked; pick the folder of a bundle");
  // A worker receives a file without its path.
  return { files: [...files].map((file) => ({ path: file.webkitRelativePath, file })), pem: await pem?.text() };
}

element("open-folder").addEventListener("click", () => reopen(picked));
element("open-served").addEventListener("click", () => reopen(() => ({})));

await begin();
document.documentElement.dataset.ready = "yes";

/** Keep a copy of what the server has now. What becomes of it is shown; the page works whatever it is. */
async function keepCopy() {
  const shown = element("offline");
  if (!navigator.serviceWorker) {
    shown.textContent = "This browser keeps no copy of this page: it works while its server does.";
    return;
  }
  try {
    await navigator.serviceWorker.register("serviceworker.js", { updateViaCache: "none" });
    const { active } = await navigator.serviceWorker.ready;
    shown.textContent = text(await asked(active));
  } catch (error) {
    shown.textContent = `This browser keeps no copy of this page: ${error.message}`;
  }
}

const asked = (worker) =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = ({ data }) => {
      port1.close();
      resolve(data);
    };
    worker.postMessage("keep", [port2]);
  });

function text({ kept, copied, error }) {
  if (error) return error;
  if (copied !== undefined) return `The server cannot be reached: this is the copy of ${new Date(copied).toLocaleString()}.`;
  return `A copy is kept in this browser (${(kept / 1e6).toFixed(1)} MB): the page works without its server too.`;
}
