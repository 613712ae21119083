// Devices in a program of their own: requests on standard input and answers on standard output, a JSON object a line.

import { createInterface } from "node:readline";

import { Root } from "../../../../client/browser/page/aggregation/certificates.js";
import { epsilonOf } from "../../../../client/browser/page/aggregation/accounting.js";
import { encode, noisyContribution } from "../../../../client/browser/page/aggregation/contribution.js";
import { Device } from "../../../../client/browser/page/aggregation/device.js";
import { Participant } from "../../../../client/browser/page/aggregation/participant.js";
import { spent } from "../../../../client/browser/page/aggregation/privacyledger.js";
import { ConfigError } from "../../../../client/browser/page/errors.js";
import { Policy } from "../../../../client/browser/page/aggregation/policy.js";

const bytes = (base64) => new Uint8Array(Buffer.from(base64, "base64"));
const base64 = (raw) => Buffer.from(raw).toString("base64");
const keys = new Map();
const participants = new Map();
const values = new Map(); // of the next contribution
const ledgers = new Map(); // as they were stored last
const full = new Map(); // whether a device's storage is

const ACTIONS = {
  /** Makes an identity key that cannot be exported; its public half. */
  async generate({ device }) {
    const pair = await crypto.subtle.generateKey("Ed25519", false, ["sign", "verify"]);
    keys.set(device, { key: pair.privateKey, publicKey: new Uint8Array(await crypto.subtle.exportKey("raw", pair.publicKey)) });
    return { key: base64(keys.get(device).publicKey) };
  },

  async enrol({ device, certificate, root, coordinator, policy }) {
    const own = { ...keys.get(device), certificate: bytes(certificate), coordinator: bytes(coordinator), policy: new Policy(policy) };
    const train = async (plan, spec) => {
      const own = values.get(device);
      const noisy = () => noisyContribution(own.delta, spec, plan.adapter_digest);
      return { vector: await (spec.privacy ? noisy() : encode(spec.vector, own)), parts: null };
    };
    const keep = async (step, { privacy }) => {
      if (full.get(device)) throw new ConfigError("no room", "identities");
      ledgers.set(device, privacy);
    };
    const known = new Device({ ...own, root: await Root.open(bytes(root)) });
    participants.set(device, new Participant(known, train, 0n, { keep, quantum: 0 }));
    return {};
  },

  async fill({ device, full: isFull }) {
    full.set(device, isFull);
    return {};
  },

  async ledger({ device, delta }) {
    const { noisy, bare } = ledgers.get(device);
    return { epsilon: epsilonOf(spent(ledgers.get(device)), delta), noisy, bare };
  },

  async train({ device, values: given }) {
    values.set(device, Object.fromEntries(Object.entries(given).map(([name, numbers]) => [name, Float64Array.from(numbers)])));
    return {};
  },

  async answer({ device, step, ...given }) {
    const fields = Object.fromEntries(Object.entries(given).map(([name, value]) => [name, bytes(value)]));
    return { body: base64(await participants.get(device).answer(step, fields, null)) };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { action, ...given } = JSON.parse(line);
  const found = await ACTIONS[action](given).catch(({ name, about, message }) => ({ refused: { name, about, message } }));
  process.stdout.write(`${JSON.stringify(found)}\n`);
}
