// The page's side of serviceworker.js: has it keep a copy of the page and the served bundle, and says what it keeps.

import { element } from "./dom.js";

/** Keep a copy of what the server has now. What becomes of it is shown; the page works whatever it is. */
export async function keepCopy() {
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
