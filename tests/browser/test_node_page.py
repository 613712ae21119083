"""The program for Node in the how-to on using a bundle runs, with the runtime that the page's own libraries bring."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from client.browser.server import LIBRARIES
from tests.support.programs import READER
from tests.vectors.make_bundle import FOLDER, LABELS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "use-a-bundle.md"
RUNTIME = LIBRARIES / "onnxruntime-web" / "dist" / "ort.node.min.mjs"


def test_the_page_for_node_gives_the_expected_logits(tmp_path: Path, node: str) -> None:
    (program,) = re.findall(r"^```js\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert program.count('"onnxruntime-node"') == 1
    (tmp_path / "classify.mjs").write_text(program.replace("onnxruntime-node", RUNTIME.as_uri()))
    shutil.copytree(FOLDER, tmp_path / "bundle")
    shutil.copytree(READER, tmp_path / "reader")
    done = subprocess.run([node, "classify.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    answer = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))["answers"][0]
    assert f"[{', '.join(f'{token}n' for token in answer['ids'])}]" in program
    assert f'"{answer["text"]}"' in program
    expected = dict(zip(LABELS, answer["logits"]["int4"], strict=True))
    assert {label: float(logit) for label, logit in found.items()} == pytest.approx(expected, abs=1e-5)
    assert '"version":7' in (tmp_path / "bundle" / "trust.seen.json").read_text()
