// Builds the package @edgeadapt/device of the page's modules: node build.mjs OUT

import { build } from "esbuild";
import { cp, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = dirname(fileURLToPath(import.meta.url));
const ROOT = join(HERE, "../../..");
const LIBRARIES = join(HERE, "../page/node_modules");
const COPIED = ["index.d.ts", "node.d.ts", "README.md"];
const [out] = process.argv.slice(2);
const { devDependencies: _, ...described } = JSON.parse(await readFile(join(HERE, "package.json"), "utf8"));
const vendor = JSON.parse(await readFile(join(HERE, "../vendor.json"), "utf8"));

/** The page's libraries: ONNX Runtime stays the app's own, the others become part of the package. */
const libraries = {
  name: "libraries",
  setup(building) {
    building.onResolve({ filter: /\/vendor\// }, ({ path }) => {
      if (path.includes("onnxruntime-web")) return { path: path.includes("jspi") ? "onnxruntime-web/jspi" : "#ort", external: true };
      return { path: join(LIBRARIES, vendor[path.slice(path.indexOf("vendor/"))]) };
    });
    building.onResolve({ filter: /^\.\/index\.js$/ }, ({ path }) => ({ path, external: true }));
  },
};

await rm(out, { recursive: true, force: true });
await mkdir(out, { recursive: true });
await build({
  entryPoints: { index: join(HERE, "../page/device.js"), node: join(HERE, "node.js") },
  outdir: out,
  splitting: true,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  platform: "neutral",
  external: ["node:*"],
  plugins: [libraries],
  logLevel: "warning",
});
for (const name of COPIED) await cp(join(HERE, name), join(out, name));
await cp(join(ROOT, "LICENSE"), join(out, "LICENSE"));
for (const [name, path] of Object.entries(vendor)) {
  if (name.endsWith("/LICENSE")) await cp(join(LIBRARIES, path), join(out, `LICENSE.${name.split("/")[1]}`));
}
await writeFile(join(out, "package.json"), `${JSON.stringify(described, null, 2)}\n`);
