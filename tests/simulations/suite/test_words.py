"""A run whose clients learn the labels of words, and what its bundle says of the words of a text."""

import csv
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

import edgeadapt
from aggregation.errors import DataError
from client.inference.library import Library
from client.inference.server import Service, Tenants
from tests.support import refused

ROOMS, HOURS = ("kitchen", "den", "hall"), ("nine", "ten", "noon")
SAY = ("light the {} at {}", "at {1} heat the {0}", "wake me in the {} at {}", "the {} should be warm by {}")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of eight clients, of rooms and hours."""
    path, rng = tmp_path_factory.mktemp("texts") / "texts.csv", np.random.default_rng(0)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "client"))
        for client in range(8):
            for _ in range(14):
                room, hour = (f"[{rng.choice(of)}]({name})" for of, name in ((ROOMS, "room"), (HOURS, "hour")))
                rows.writerow((rng.choice(SAY).format(room, hour), f"client-{client}"))
    return path


@pytest.mark.slow
def test_a_run_learns_the_labels_of_words_and_its_bundle_writes_them_into_a_text(
    texts: Path, tmp_path: Path, minilm: Path, run: Callable[..., tuple[int, str, str]], one_thread: None
) -> None:
    out = tmp_path / "run"
    settings = {
        "data.files": json.dumps([str(texts)]),
        "data.task": "words",
        "data.client": "client",
        "data.near_duplicates": 1,
        "base.model": str(minilm),
        "adapter.layers": 1,
        "federation.rounds": 1,
        "federation.analytic.rounds": 1,
        "personal.method": "ridge",
        "export.minimum_agreement": 0.9,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    code, shown, errors = run("simulate", "run", "households.toml", "--out", out, "--engine", "protocol", *options)
    assert code == 0, errors
    (line,) = [line for line in shown.splitlines() if line.startswith("words ")]
    assert float(line.split("F1 ")[1].split()[0]) > 0.9
    assert "device infer --bundle" in shown
    assert "--words" in shown
    code, shown, errors = run("audit", "verify", out)
    assert code == 0, (shown, errors)

    bundle, text = out / "bundle", "at ten heat the den"
    code, shown, errors = run("device", "infer", "--bundle", bundle, "--words", text, "light the hall at noon")
    assert (code, errors) == (0, "")
    assert shown.splitlines() == ["at [ten](hour) heat the [den](room)", "light the [hall](room) at [noon](hour)"]
    code, shown, _ = run("device", "infer", "--bundle", bundle, "--words", "--json", text)
    (answer,) = json.loads(shown)["adapters"][0]["answers"]
    words = [(row["word"], row["label"]) for row in answer["words"]]
    assert words == [("at", "O"), ("ten", "hour"), ("heat", "O"), ("the", "O"), ("den", "room")]
    model = edgeadapt.load(bundle)
    assert [found[:2] for found in model.words(text)] == words
    with refused(DataError, "text"):
        model.words("?!")
    app = Service(Library.open(bundle, None), None, 1, 2**28).application(["testserver"])
    with TestClient(app) as client:
        asked = {"model": "global", "input": [text, "light the hall"], "words": True}
        found = client.post("/v1/classify", json=asked).json()["data"]
        assert [row["labelled"] for row in found] == [answer["labelled"], "light the [hall](room)"]
        assert [row["label"] for row in found[0]["words"]] == [label for _, label in words]
        assert client.post("/v1/classify", json={**asked, "input": "?!"}).status_code == 400
        many = client.post("/v1/classify", json={**asked, "input": ["turn it on"] * 100})
        assert (many.status_code, "more than 256 words" in many.text) == (400, True)
    token, each = "t" * 32, {"adapters": ["*"], "requests_per_minute": 6}
    of = Tenants.parse({"tenants": {"anna": {"token_sha256": sha256(token.encode()).hexdigest(), **each}}}, "test")
    app = Service(Library.open(bundle, None), of, 1, 2**28).application(["testserver"])
    with TestClient(app, headers={"authorization": f"Bearer {token}"}) as client:
        statuses = [client.post("/v1/classify", json={**asked, "input": text}).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]  # of five words each
