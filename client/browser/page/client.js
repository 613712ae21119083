// The page's side of worker.js: calls that return promises.

// Calls without pieces, as device.js has them.
const PLAIN = ["use", "classify", "undo", "exported", "reset", "identity", "enrol", "invited", "redeem", "renew", "install", "forget"];

export class Client {
  #worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  #waiting = new Map(); // id → { resolve, reject, piece }
  #last = 0;

  constructor() {
    this.#worker.onmessage = ({ data }) => this.#settle(data);
    this.#worker.onerror = (event) => {
      const error = new Error(`the page's worker cannot run: ${event.message ?? "its files are missing"}`);
      for (const { reject } of this.#waiting.values()) reject(error);
      this.#waiting.clear();
    };
    for (const name of PLAIN) this[name] = (...args) => this.#call(name, args);
  }

  open = (args = {}, progress) => this.#call("open", [args], progress);
  generate = ({ prompt, chat, ...options }, piece) => this.#call(chat ? "chat" : "complete", [prompt, options], piece);
  teach = (name, corrections, compared = [], piece) => this.#call("teach", [name, corrections, { compared }], piece);
  takePart = (options, piece) => this.#call("takePart", [options], piece);
  leave = () => this.#worker.postMessage({ method: "leave" });
  stop = () => this.#worker.postMessage({ method: "stop" });

  #call(method, args, piece) {
    const id = ++this.#last;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject, piece });
      this.#worker.postMessage({ id, method, args });
    });
  }

  #settle({ id, piece, result, error }) {
    const call = this.#waiting.get(id);
    if (piece) return call.piece?.(piece);
    this.#waiting.delete(id);
    if (error) call.reject(Object.assign(new Error(error.message), { name: error.name, about: error.about }));
    else call.resolve(result);
  }
}
