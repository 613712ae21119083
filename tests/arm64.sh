#!/usr/bin/env bash
# The Python package on arm64, emulated by qemu-user: Debian's Python and PyPI's wheels answer as this machine does.
# Needs qemu-user and mmdebstrap (Debian: apt install qemu-user mmdebstrap), root or user namespaces, and at first the network.
#   tests/arm64.sh [BUNDLE [ADAPTER [TEXT]]]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

bundle=${1:-tests/vectors/bundle/bundle} adapter=${2:-int4} text=${3:-turn on the light}
python=${PYTHON:-.venv/bin/python} work=build/arm64
if [[ ! -e $work/ready ]]; then
  rm -rf "$work" && mkdir -p "$work"
  mmdebstrap --quiet --variant=extract --architectures=arm64 --include=python3,libstdc++6 trixie "$work/root"
  ln -sfn usr/lib "$work/root/lib" # where the loader is sought
  "$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >"$work/needed"
  platforms=(--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64)
  "$python" -m pip install --quiet --disable-pip-version-check --target "$work/packages" "${platforms[@]}" \
    --python-version 3.13 --only-binary=:all: -r "$work/needed" 2>"$work/pip.log" || { cat "$work/pip.log" >&2; exit 1; }
  touch "$work/ready"
fi

export PYTHONPATH=$work/packages:. PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
arm64=(qemu-aarch64 -L "$work/root" "$work/root/usr/bin/python3.13")
copy=$(mktemp -d "$work/XXXXXX")
trap 'rm -rf "$copy"' EXIT
cp -r "$bundle" "$copy/bundle" && cp "$(dirname "$bundle")/trust.pem" "$copy/"

"${arm64[@]}" -c 'import platform, onnxruntime; print(platform.machine(), "onnxruntime", onnxruntime.__version__)'
infer=(-m edgeadapt device infer --bundle "$copy/bundle" --adapter "$adapter" --json "$text")
"${arm64[@]}" "${infer[@]}" >"$copy/emulated"
rm -f "$copy/trust.seen.json"
PYTHONPATH=. "$python" "${infer[@]}" >"$copy/native"
"$python" - "$copy" <<'END'
import json, sys
from pathlib import Path

def shares(name: str) -> dict[str, float]:
    (answer,) = json.loads((Path(sys.argv[1]) / name).read_text())["adapters"][0]["answers"]
    return {one["intent"]: one["probability"] for one in answer["intents"]}

emulated, native = shares("emulated"), shares("native")
print("arm64:", emulated, "here:", native)
difference = max(abs(emulated.get(label, 0) - share) for label, share in native.items())
# As the page and a native device differ at most with 8-bit weights.
sys.exit(None if native and difference < 0.03 else "arm64 answers something else")
END
sed -i 's/"payload": *"./"payload": "A/' "$copy/bundle/adapters/$adapter.json"
if "${arm64[@]}" "${infer[@]}" >/dev/null 2>"$copy/refused"; then
  echo "an altered manifest was accepted" >&2
  exit 1
fi
cat "$copy/refused"
