// The page's side of worker.js: calls that return promises.

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
  }

  open = (args = {}, progress) => this.#call("open", args, progress);
  use = (name) => this.#call("use", [name]);
  rank = (text, top) => this.#call("classify", [text, top]);
  generate = (args, piece) => this.#call("generate", args, piece);
  teach = (name, corrections, compared = [], piece) => this.#call("teach", { name, corrections, compared }, piece);
  undo = () => this.#call("undo", []);
  exported = (name) => this.#call("exported", [name]);
  reset = () => this.#call("reset", []);
  identity = () => this.#call("identity", []);
  enrol = (args) => this.#call("enrol", [args]);
  invited = (token) => this.#call("invited", [token]);
  redeem = (token, url) => this.#call("redeem", [token, url]);
  renew = (url) => this.#call("renew", [url]);
  install = (certificate) => this.#call("install", [certificate]);
  forget = () => this.#call("forget", []);
  takePart = (args, piece) => this.#call("takePart", args, piece);
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
