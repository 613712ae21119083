"""The recipe of docs/how-to/export-a-bundle.md with transformers and peft: from a CSV file to what a browser learns."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.inference.session import ClassificationSession
from edgeadapt.bases.base import Base
from tests.browser.test_learning import answers, taught_in
from tests.docs.conftest import ROOT, Reader, blocks_of
from tests.docs.conftest import reader as reader
from tests.support.models import LABELS, PHRASES
from tests.support.recipes import SIZES, bare

pytestmark = pytest.mark.slow

RECIPE = ROOT / "docs" / "how-to" / "export-a-bundle.md"
CORRECTED, LABEL = "turn on the door", "Lock"  # as the page has it


def test_what_trainer_made_of_a_csv_file_learns_a_correction_in_a_browser_and_natively(
    page: Any, serve: Callable[[Path], str], tiny_base: Base, reader: Reader
) -> None:
    work = reader.folder
    bare(work / "my-encoder", tiny_base, "bert", SIZES)
    rows = [f"{text},{label}" for text, label in zip(PHRASES, [*LABELS, "Lock", "Light", "Lock"], strict=True)]
    (work / "phrases.csv").write_text("\n".join(["text,label", *rows, f"{CORRECTED},Music"]) + "\n")
    script = re.search(r"`train\.py`:\n\n```python\n(.*?)```", RECIPE.read_text(encoding="utf-8"), re.DOTALL)
    assert script
    (work / "train.py").write_text(script[1])
    (block,) = blocks_of(RECIPE)
    *made, teaches = block.commands.splitlines()
    assert f'--teach {LABEL} "{CORRECTED}"' in teaches
    assert "devices can train it" in reader.run("\n".join(made))
    phone = work / "phone" / "bundle"
    shutil.copytree(work / "bundle", phone)
    shutil.copy(work / "trust.pem", phone.parent)
    page.goto(serve(phone))
    assert page.state() == "good", page.status()
    found = taught_in(page, CORRECTED, LABEL)
    assert found["error"] == ""
    assert found["in use"].startswith("In use: personal,"), page.alert("adapter-error")
    reader.run(teaches)
    expected = ClassificationSession.open(work / "bundle").rank([CORRECTED], "personal", len(LABELS))[0]
    assert expected[0].label == LABEL
    assert answers(page, CORRECTED) == [(one.label, pytest.approx(one.probability, abs=0.03)) for one in expected]
