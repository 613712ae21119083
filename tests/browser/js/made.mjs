// What the Python side made for these tests (tests/browser/test_modules.py).

import { readFileSync } from "node:fs";

export const made = JSON.parse(readFileSync(process.env.EDGEADAPT_MADE, "utf8"));
export const bytes = (base64) => new Uint8Array(Buffer.from(base64, "base64"));
