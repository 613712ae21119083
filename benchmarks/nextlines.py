"""What adapters add to the completions of projects: bits per byte, and next lines that are exact.

    python -m benchmarks code runs/code

A finished run of code.toml has the global adapter and each project's own; ``local`` and ``central`` are trained here,
as a suite does. The texts are the projects' test pieces. A line is exact if each of its tokens, and then a line break,
is the likeliest after the lines before it and its indentation: what a greedy completion with "\\n" as its stop writes.
Intervals are of projects and their pieces, resampled together; there is one seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from aggregation.errors import ConfigError
from benchmarks.timing import Note, aligned
from client.node.statedir import PERSONAL
from client.training.examples import Example, Split
from client.training.torchengine import TorchEngine
from client.training.trainer import LanguageTrainer
from edgeadapt.formats import files
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods import trainable
from simulations.data import populate
from simulations.engine import provision
from simulations.scenario import Scenario
from simulations.suite.run import RESULT, SCENARIO
from simulations.suite.trial import ArmInputs, arms_of, one_thread

ARMS = ("base", "local", "global", "personal", "central")
OURS = "personal"
DRAWS = 2000
Rows = NDArray[np.float64]  # shape (texts, 3): bits per byte, exact lines, lines


@dataclass(frozen=True, slots=True)
class Project:
    name: str
    unseen: bool
    rows: Mapping[str, Rows]  # of each arm


def exact_lines(text: str, offsets: Sequence[tuple[int, int]], hits: Sequence[bool], breaks: Sequence[bool]) -> Rows:
    """Count exact lines and lines after the first, without blank ones and those whose end is not among the tokens.

    ``offsets``: of the tokens in ``text``; ``hits``: whether the likeliest token at each place is the one that stands
    there; ``breaks``: whether it begins a new line. A token may begin with the last blank of an indentation.
    """
    exact, count, begin = 0, 0, text.find("\n") + 1
    while 0 < begin < len(text):
        end = text.find("\n", begin)
        first = begin + len(text[begin:]) - len(text[begin:].lstrip(" \t"))
        within = [place for place, (low, high) in enumerate(offsets) if high > first and low < end]
        after = next((place for place, (low, _) in enumerate(offsets) if low == end), None)
        if first < end and within and after is not None and offsets[within[0]][0] >= first - 1:
            count += 1
            exact += all(hits[place] for place in within) and breaks[after]
        begin = end + 1
    return np.array([exact, count], np.float64)


def scored(trainer: LanguageTrainer, adapter: Tensors, texts: Sequence[str]) -> Rows:
    """Return a row for each text."""
    engine, tokenizer, rows = cast(TorchEngine, trainer.engine), trainer.encoder.tokenizer, []
    begins = {token for piece, token in tokenizer.get_vocab().items() if tokenizer.decode([token])[:1] == "\n"}
    with torch.inference_mode():
        trainable.load(engine.model, adapter)
        for text in texts:
            (encoded,) = trainer.encode([Example(text, -1, Split.TEST)])
            ((_, batch),) = trainer._batches([encoded], [0.0], len(encoded.ids))
            logits = engine._logits(batch)
            nats = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets), reduction="sum")
            likeliest = logits.argmax(1).tolist()
            offsets = tokenizer.encode(text, add_special_tokens=False).offsets[: len(encoded.ids)]
            hits = [False, *(best == target for best, target in zip(likeliest, encoded.targets, strict=True))]
            lines = exact_lines(text, offsets, hits, [False, *(best in begins for best in likeliest)])
            rows.append([float(nats) / encoded.size / math.log(2), *lines])
    return np.array(rows)


def measure(run: Path, note: Note) -> list[Project]:
    """Score each arm on each project's test pieces. Raises ConfigError: no run of a language model is there."""
    if not (run / RESULT).exists():
        raise ConfigError(f"{run} has no finished run: simulate code.toml with --out {run}", about="RUN")
    scenario = Scenario.model_validate_json((run / SCENARIO).read_text())
    if not scenario.data.for_language_model:
        raise ConfigError(f"{run} is a run of a classifier: name one of code.toml", about="RUN")
    population = populate(scenario.data, scenario.population, scenario.seed).population
    base = provision.training_base(run, scenario, population)
    manifest, blob = provision.first_adapter(scenario, population, base)
    inputs = ArmInputs.of(scenario, manifest, files.decode(blob), population)
    registry = provision.registry(run)
    shared, found = registry.tensors((registry.latest() or registry.version(0)).manifest.version), []
    with one_thread():
        (arms,) = arms_of(base, inputs, 1, lambda: None)
        note("central")
        central = arms.pooled()
        for client in population.clients:
            note(client.name)
            own = files.decode((provision.device_folder(run, client.name) / PERSONAL).read_bytes())
            adapters = (inputs.seed_adapter, arms.local(client).adapter, shared, own, central)
            texts, trainer = [one.text for one in client.test], cast(LanguageTrainer, arms.mine)
            rows = {arm: scored(trainer, each, texts) for arm, each in zip(ARMS, adapters, strict=True)}
            found.append(Project(client.name, client.unseen, rows))
    return found


def bits(rows: Sequence[Rows]) -> float:
    return float(np.mean([some[:, 0].mean() for some in rows]))


def exact(rows: Sequence[Rows]) -> float:
    total = np.sum([some.sum(axis=0) for some in rows], axis=0)
    return float(total[1] / total[2])


def difference(projects: Sequence[Project], arm: str, of: Callable[[Sequence[Rows]], float]) -> tuple[float, float]:
    """Return the 95 % interval of what ``OURS`` has more than ``arm``."""
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = [projects[at] for at in rng.integers(0, len(projects), len(projects))]
        places = [rng.integers(0, len(one.rows[arm]), len(one.rows[arm])) for one in drawn]
        ours, other = (
            of([one.rows[name][some] for one, some in zip(drawn, places, strict=True)]) for name in (OURS, arm)
        )
        found.append(ours - other)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def summary(projects: Sequence[Project]) -> dict[str, Any]:
    """Summarize the projects that took part, and the others: figures of each arm, and how far ``OURS`` is from it."""
    found: dict[str, Any] = {}
    for kind, unseen in (("seen", False), ("unseen", True)):
        some = [one for one in projects if one.unseen is unseen]
        pieces = sum(len(one.rows[OURS]) for one in some)
        lines = int(sum(one.rows[OURS][:, 2].sum() for one in some))
        found[kind] = {"projects": len(some), "pieces": pieces, "lines": lines, "arms": {}}
        for arm in ARMS:
            rows = [one.rows[arm] for one in some]
            found[kind]["arms"][arm] = {
                name: {"value": of(rows), "ours minus it": difference(some, arm, of)}
                for name, of in (("bits per byte", bits), ("exact lines", exact))
            }
    return found


def table(found: Mapping[str, Any]) -> str:
    parts = []
    for kind, what in found.items():
        head = [f"{what['projects']} {kind}, {what['pieces']} pieces, {what['lines']} lines"]
        head += ["bits/byte", f"{OURS} -", "exact", f"{OURS} -"]
        rows = []
        for arm, figures in what["arms"].items():
            cells = [arm]
            for name, form in (("bits per byte", ".3f"), ("exact lines", ".1%")):
                low, high = figures[name]["ours minus it"]
                cells.append(f"{figures[name]['value']:{form}}")
                cells.append("" if arm == OURS else f"{low:+{form}} to {high:+{form}}")
            rows.append(cells)
        parts.append(aligned([head, *rows]))
    return "\n\n".join(parts)
