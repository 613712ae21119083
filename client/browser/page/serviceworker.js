// Keeps one copy of the page and its bundle in this browser, and answers from it while the server cannot be reached. The server goes first,
// always. The copy is replaced as a whole: it is used from the moment on at which every file of site.json is in it, each with the digest
// that is stated there, and the copy before is deleted then. A page comes from the server or from the copy, never from both; what it reads
// later, it verifies itself (trust.js). In: "keep", with a MessagePort. Out: { kept: bytes } with the server, { copied: date } without, or
// { error }.

const SITE = "site.json"; // path → SHA-256 of each file; stored as the last one of a copy
const READ_LATER = /^(bundle\/.*|bundle\.json|trust\.pem)$/; // the other files are the page's code
const PREFIX = `edgeadapt ${self.registration.scope} `; // of the names of copies; the digest of their site.json follows
const DAMAGED = "The copy of this page in this browser is damaged. Connect to the page's server, and open it again.";
const UNREACHABLE = "The page's server cannot be reached, and this browser keeps no copy of the page.";

const fromCopy = new Set(); // clients (the page and its workers) whose code is the copy's
let keeping = Promise.resolve();

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("message", (event) => {
  const [port] = event.ports;
  if (event.data !== "keep" || !port) return;
  keeping = keeping.then(keep).catch(failed).then((result) => port.postMessage(result)); // of two tabs, one after the other
  event.waitUntil(keeping);
});

self.addEventListener("fetch", (event) => {
  const { request, clientId, resultingClientId } = event;
  const path = pathOf(request.url);
  if (path === null || !["GET", "HEAD"].includes(request.method)) return;
  if (request.mode === "navigate") event.respondWith(fetch(request).catch(() => opened(resultingClientId)));
  else if (READ_LATER.test(path)) event.respondWith(fetch(request).catch(() => copied(path, request.method)));
  else if (fromCopy.has(clientId)) {
    if (resultingClientId) fromCopy.add(resultingClientId); // a worker's
    event.respondWith(copied(path, request.method));
  }
});

/** The path of a URL below the page, without a query; null if it is elsewhere. */
function pathOf(url) {
  const { origin, pathname } = new URL(url);
  const root = new URL(self.registration.scope);
  if (origin !== root.origin || !pathname.startsWith(root.pathname)) return null;
  return pathname.slice(root.pathname.length) || "index.html";
}

const urlOf = (path) => new URL(path, self.registration.scope).href;

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const names = async () => (await caches.keys()).filter((name) => name.startsWith(PREFIX));

/** The complete copy: { name, cache, site: the response with its site.json }, or null. */
async function complete() {
  for (const name of (await names()).reverse()) {
    const cache = await caches.open(name);
    const site = await cache.match(urlOf(SITE));
    if (site) return { name, cache, site };
  }
  return null;
}

/** The page itself, from the copy, with all of its code as it was stored. */
async function opened(client) {
  const copy = await complete();
  if (!copy) return new Response(UNREACHABLE, { status: 503 });
  const code = Object.entries(await copy.site.json()).filter(([path]) => !path.startsWith("bundle/"));
  const sound = await Promise.all(code.map(([path, digest]) => holds(copy.cache, path, digest)));
  if (sound.includes(false)) return new Response(DAMAGED, { status: 503 });
  fromCopy.add(client);
  return copied("index.html", "GET");
}

/** A file of the copy; a network error if it is not there. */
async function copied(path, method) {
  const found = await (await complete())?.cache.match(urlOf(path));
  if (!found) return Response.error();
  return method === "HEAD" ? new Response(null, found) : found;
}

async function holds(cache, path, digest) {
  const found = await cache.match(urlOf(path));
  return found !== undefined && (await sha256(await found.arrayBuffer())) === digest;
}

/** Make the copy that of the server's files now. */
async function keep() {
  const old = await complete();
  const response = await fetch(urlOf(SITE), { cache: "no-cache" }).catch(() => null);
  if (!response) return old ? { copied: old.site.headers.get("Date") } : { error: UNREACHABLE };
  if (!response.ok) throw new Error(`the server answers ${response.status} for ${SITE}`);
  const listed = await response.arrayBuffer();
  const files = Object.entries(JSON.parse(new TextDecoder().decode(listed)));
  const name = PREFIX + (await sha256(listed));
  if (name !== old?.name) {
    const cache = await caches.open(name);
    try {
      for (const [path, digest] of files) await store(cache, path, digest, old?.cache);
      await cache.put(urlOf(SITE), answer(listed, response));
    } catch (error) {
      await caches.delete(name);
      throw error;
    }
  }
  for (const other of await names()) if (other !== name) await caches.delete(other);
  return { kept: await sizeOf(await caches.open(name)) };
}

/** Store a file: of the copy before, if it has not changed since, or of the server. */
async function store(cache, path, digest, old) {
  let found = await old?.match(urlOf(path));
  let bytes = await found?.arrayBuffer();
  if (!bytes || (await sha256(bytes)) !== digest) {
    found = await fetch(urlOf(path), { cache: "no-cache" });
    bytes = await found.arrayBuffer();
    if (!found.ok || (await sha256(bytes)) !== digest) throw new Error(`${path} changed meanwhile`);
  }
  await cache.put(urlOf(path), answer(bytes, found));
}

/** A response that can be stored: without what held for the way from the server only. */
function answer(bytes, { headers }) {
  const kept = new Headers(headers);
  kept.delete("Content-Encoding");
  kept.set("Content-Length", bytes.byteLength);
  kept.set("Date", new Date().toUTCString());
  return new Response(bytes, { headers: kept });
}

async function sizeOf(cache) {
  const lengths = (await cache.matchAll()).map(({ headers }) => Number(headers.get("Content-Length")));
  return lengths.reduce((sum, length) => sum + length, 0);
}

function failed({ name, message }) {
  const why = name === "QuotaExceededError" ? "it has no room for it; make room on the disk" : message;
  return { error: `This browser cannot copy the page for use without its server: ${why}. A copy from before stays.` };
}
