/** An error is one line: what is wrong, and what to do. `about` names the file, field or option. */
export class EdgeAdaptError extends Error {
  readonly about: string;
}
/** A file is not what a pinned key signed, or is older than what was accepted before. */
export class TrustError extends EdgeAdaptError {}
/** A setting contradicts another or is out of range, or this device lacks a feature. */
export class ConfigError extends EdgeAdaptError {}
/** A file or a text cannot be used. */
export class DataError extends EdgeAdaptError {}
/** A peer sent what the protocol does not allow. */
export class ProtocolError extends EdgeAdaptError {
  readonly peer: string;
}

/** Where the files of a bundle come from. Nothing that it gives is trusted. */
export interface Source {
  /** A file, such as `base/web.onnx`; more than `limit` bytes are an error. */
  read(path: string, limit: number, count?: (bytes: number) => void): Promise<Uint8Array>;
  /** The number of its bytes; null if it is not known. */
  size(path: string): Promise<number | null>;
  /** The names of the files `adapters/NAME.json`. */
  adapterNames(): Promise<string[]>;
}

/** Files below a URL; `listing` is the URL of bundle.json. */
export class HttpSource implements Source {
  constructor(root: string | URL, listing: string | URL);
  read(path: string, limit: number, count?: (bytes: number) => void): Promise<Uint8Array>;
  size(path: string): Promise<number | null>;
  adapterNames(): Promise<string[]>;
}

/** Files that a folder picker gave, with the folder's own name before each path. */
export class FolderSource implements Source {
  constructor(files: Array<{ path: string; file: { size: number; arrayBuffer(): Promise<ArrayBufferLike | Uint8Array> } }>);
  read(path: string, limit: number, count?: (bytes: number) => void): Promise<Uint8Array>;
  size(path: string): Promise<number | null>;
  adapterNames(): Promise<string[]>;
}

/**
 * Records in memory, where there is no IndexedDB. A class derived from it keeps more by `read` and `write`: "versions" (accepted
 * versions, which can be JSON), "learned" and "identities" (which contain keys that can be cloned only). Without the versions an older
 * adapter is accepted again.
 */
export class Store {
  read(store: string): Promise<Map<string, unknown> | undefined>;
  write(store: string, records: Map<string, unknown>): Promise<void>;
}

export interface Opening {
  source: Source;
  /** The pinned public keys in PEM form, from the app and never from the bundle. */
  keys: string;
  /** Without it, IndexedDB. */
  store?: Store;
  /** Without it, WebGPU if it gives the same numbers sooner. */
  provider?: "wasm" | "webgpu";
  progress?: (state: { received: number; total: number | null } | { starting: true }) => void;
}

/** What is signed about an adapter. */
export interface AdapterManifest {
  readonly name: string;
  readonly version: number;
  readonly base_digest: string;
  readonly labels: readonly string[];
  /** Null of a shared adapter; of a private one, the digest of the one that it was made from. */
  readonly parent: string | null;
  readonly [field: string]: unknown;
}

export type Listed = { name: string; manifest: AdapterManifest } | { name: string; refused: string };

export interface Adapters {
  adapters: Listed[];
  /** The names of those that were learned here. */
  learned: string[];
  /** How many lessons can be undone. */
  lessons: number;
}

export interface About extends Adapters {
  task: "text-classification" | "text-generation";
  profile: string;
  /** The digest of the base. */
  base: string;
  trainable: boolean;
  runsOn: string;
  /** Tokens; of a language model. */
  context?: number;
  chat: boolean;
  /** Pictures are texts too: data URIs of PNG, JPEG or WebP, which a browser decodes, and Node does not. So are sounds, of WAV. */
  reads: "text" | "picture" | "sound";
}

export interface Classified {
  adapter: string;
  /** Most likely first; empty if a policy says something instead. */
  labels: Array<{ label: string; probability: number }>;
  outcome?: string;
  says?: string | null;
  /** The share of tokens that the base does not know. */
  unknown: number;
  /** How many tokens at the end are not read. */
  unread: number;
  milliseconds: number;
}

export interface Writing {
  system?: string;
  maxTokens?: number;
  temperature?: number;
  topP?: number;
  seed?: number;
  /** Ends the text; what was written is kept. */
  signal?: AbortSignal;
  onPiece?: (piece: { text: string }) => void;
}

export interface Written {
  text: string;
  finish: string;
  tokens: number;
  prompt: number;
  reused: number;
  first: number;
  milliseconds: number;
  /** Messages of the conversation. */
  remembered: number;
}

/** Of a language model `text` is a message, and `label` the right answer. */
export interface Correction {
  text: string;
  label: string;
}

export interface Teaching {
  /** To see what a language model forgets. */
  compared?: Array<{ text: string; prompt?: string }>;
  /** Ends the lesson; the adapter in use stays. */
  signal?: AbortSignal;
  onProgress?: (state: { steps: number; most: number; comparing?: { part: number; of: number } }) => void;
}

export interface Taught extends Adapters {
  adapter: string;
  version: number;
  steps: number;
  [found: string]: unknown;
}

export interface Undone extends Adapters {
  /** Null if the lesson had made the adapter, which is gone now. */
  adapter: string | null;
  version: number | null;
  corrections: Correction[];
}

export interface Identity {
  device: string;
  key: string;
  coordinator: string;
  authority: string;
  /** The end of the certificate, in milliseconds; null before there is one. */
  until: number | null;
  /** The certificate request, PEM. */
  request: string;
  rounds: Array<{ at: number; round: number; version: number; outcome: string }>;
  privacy: { epsilon: number; delta: number; noisy: number; bare: number; limit: number };
}

export interface Participation {
  /** `wss://HOST:PORT` of the coordinator's gateway. */
  url: string;
  examples?: Array<{ text: string; label?: string; prompt?: string; split: "train" | "validation" }>;
  /** The least number of examples. */
  minimum: number;
  moments?: boolean;
  /** Limits of the device's policy, such as `maximum_epsilon`. */
  policy?: Record<string, number>;
  quantum?: number;
  /** Until the gateway ends the run. */
  once?: boolean;
  onProgress?: (state: Record<string, unknown>) => void;
}

/** Verify a bundle's base and adapters, or those of the names `adapters`, without loading a model. */
export function verify(given: { source: Source; keys: string; store?: Store; adapters?: string[] }): Promise<{
  base: Readonly<Record<string, unknown>>;
  adapters: Record<string, { manifest: AdapterManifest; inputs: Map<string, { shape: number[]; values: Float32Array }> }>;
}>;

/** What a person compares before this device enrols with a token. */
export function invited(token: string): Promise<{ device: string; authority: string; coordinator: string }>;

/** A verified bundle. Calls are answered one after the other; while `renew` or `takePart` waits, others are answered. */
export class Device {
  private constructor();
  static open(given: Opening): Promise<Device>;
  about(): Promise<About>;
  /** An adapter, or several in writing, as `global:0.5+anna`; "" is the base of a language model alone. */
  use(name: string): Promise<{ name: string; rank: number; parts: Array<{ name: string; weight: number }>; milliseconds: number }>;
  classify(text: string, top?: number): Promise<Classified>;
  chat(message: string, options?: Writing): Promise<Written>;
  complete(text: string, options?: Omit<Writing, "system">): Promise<Written>;
  /** Begin a new conversation. */
  reset(): Promise<void>;
  /** Teach the adapter `name`; the private adapter that results is to be used next. */
  teach(name: string, corrections: Correction[], options?: Teaching): Promise<Taught>;
  undo(): Promise<Undone>;
  /** An adapter that was learned here, as files for other devices. */
  exported(name: string): Promise<{ manifest: Uint8Array; blob: Uint8Array; pem: Uint8Array }>;
  /**
   * Take over what the source has now, or another source. After an error, what was open stays. If `replaced`, the base is another
   * one, and no adapter is in use.
   */
  update(source?: Source): Promise<Adapters & { replaced: boolean }>;
  identity(): Promise<Identity | null>;
  /** Make a key and a request; authority and coordinator are PEM. */
  enrol(given: { device: string; authority: string; coordinator: string }): Promise<Identity>;
  /** Enrol with a token at the authority's service. */
  redeem(token: string, url: string): Promise<Identity>;
  /** Install the certificate, PEM, that was issued for the request. */
  install(certificate: string): Promise<Identity>;
  /** Whether a certificate that ends soon was renewed. */
  renew(url: string): Promise<boolean>;
  /** Delete the identity. What was revealed stays counted. */
  forget(): Promise<null>;
  /** Take part in rounds until `leave`. */
  takePart(given: Participation): Promise<Identity>;
  leave(): void;
  close(): Promise<void>;
}
