// A typed use of the package, which tsc checks; `fails` is what the types must refuse.

import { Device, HttpSource, Store, TrustError, verify } from "@edgeadapt/device";
import { FileStore, folder } from "@edgeadapt/device/node";

class Kept extends Store {
  override async write(store: string, records: Map<string, unknown>): Promise<void> {
    await super.write(store, records);
  }
}

export async function uses(keys: string): Promise<string> {
  const source = new HttpSource("https://app.example/bundle/", "https://app.example/bundle.json");
  const device = await Device.open({ source, keys, store: new Kept(), provider: "wasm" });
  await device.use("global:0.5+anna");
  const [best] = (await device.classify("turn on the light", 3)).labels;
  const { adapter } = await device.teach("global", [{ text: "it is dark", label: "TurnOn" }], { signal: AbortSignal.timeout(1000) });
  const { text } = await device.chat("Good morning", { maxTokens: 20, onPiece: (piece) => piece.text.length });
  await device.undo();
  await device.takePart({ url: "wss://fleet.example:9445", minimum: 1, once: true });
  const { replaced } = await device.update();
  const { adapters } = await verify({ source: await folder("bundle"), keys, store: new FileStore("seen.json") });
  return `${best?.label} ${adapter} ${text} ${replaced} ${adapters["global"]?.manifest.version} ${TrustError.name}`;
}

export async function fails(device: Device): Promise<void> {
  // @ts-expect-error: the keys are not optional
  await Device.open({ source: await folder("bundle") });
  // @ts-expect-error: a correction has a label
  await device.teach("global", [{ text: "it is dark" }]);
}
