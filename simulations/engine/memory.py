"""How much memory a run takes at its peak, estimated before it starts, and how much this process may have.

A run has three stages: the rounds, the personal step, the export. Each holds the libraries, the texts of all clients
and copies of the base, and something of its own. The estimate is that of the stage that takes the most. Its constants
were measured on Linux (x86-64, CPython 3.11, torch 2.13); on the scenarios of
``tests/simulations/engine/test_memory.py`` it is between the measured peak and 1.5 times as much. What the making of a
population, or of a pruned or rounded base, takes is not in it.
"""

import math
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoConfig

from adapters.base import Base
from adapters.classifiergraph import MAX_TOKENS
from adapters.cores import cores
from aggregation.errors import ConfigError
from simulations.data.population import Client, LabelledText, Population
from simulations.engine.personal import MOST_AT_ONCE
from simulations.report.formatting import size
from simulations.scenario import Scenario

MB = 10**6  # bytes
LIBRARIES = 550 * MB  # torch, transformers, Flower and what reads data, imported
FORKED = 260 * MB  # of them that a process does not share which is forked from one with them (Linux)
EXPORTERS = 150 * MB  # what the export imports
TEXT = 450  # of the objects of a text, without its characters
CHARACTER = 2  # a text is in the population and in its device's examples
DEVICE = 60_000  # of a device that was ever asked: keys, certificate, what it knows of log and adapter
SHARES = 800  # of what two devices share for one round of a session, on both sides and in the coordinator
FLOAT = 4
# Copies of the base: torch's, those of the graph while it is quantized, two that answer for the parity, and those of
# the training graph while its gradients are compared with torch's.
EXPORT = 11
LOGITS = 3  # of a language model: the logits, their logarithms of probabilities, and the gradient


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Bytes that a stage takes for one thing. ``key``: of the scenario, which makes it smaller when lowered."""

    what: str
    bytes: float
    key: str


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a run takes at its peak, by its parts."""

    stage: str
    parts: tuple[MemoryPart, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def largest(self) -> MemoryPart:
        """The part that lowering a key makes smaller by the most."""
        return max((part for part in self.parts if part.key), key=lambda part: part.bytes)

    def describe(self, available: int | None) -> str:
        """What the run takes, and what the machine has, in words."""
        here = f"; {size(available)} are available" if available is not None else ""
        return f"about {size(self.bytes)} at the peak, in the {self.stage}{here}"


def estimate(
    scenario: Scenario, population: Population, base: Base, processes: int = 0, *, forked: bool = False
) -> MemoryEstimate:
    """The peak of a run of ``scenario``.

    Args:
        scenario: Of the run.
        population: The scenario's.
        base: That the run trains on.
        processes: That work for the devices besides this one.
        forked: They are those of ``workers``, which share the libraries' memory; else each imports them.
    """
    counts = _Counts.of(scenario, population, base)
    own = [
        MemoryPart("libraries", LIBRARIES, ""),
        MemoryPart("texts", counts.texts, _population_key(scenario)),
        MemoryPart("the base", base.weight_bytes, "base.model"),
    ]
    batch = "federation.training.batch_size"
    rounds = [*own, MemoryPart("a step of training", counts.step, batch), *_session(scenario, counts)]
    if processes:
        each = (FORKED if forked else LIBRARIES) + base.weight_bytes + counts.step
        rounds.append(MemoryPart(f"{processes} more processes", processes * each, "base.model"))
    if scenario.data.for_language_model:
        return MemoryEstimate("rounds", tuple(rounds))
    at_once = min(cores(), MOST_AT_ONCE)
    personal = [
        *own,
        MemoryPart(f"the base of {at_once} clients that train at once", at_once * base.weight_bytes, "base.model"),
        MemoryPart(f"a step of training of {at_once} clients", at_once * counts.step, batch),
    ]
    export = [
        *own,
        MemoryPart("what the export imports", EXPORTERS, ""),
        MemoryPart("the export of the base", EXPORT * base.weight_bytes, "base.model"),
    ]
    stages = {"rounds": rounds, "personal step": personal, "export": export}
    found = [MemoryEstimate(stage, tuple(parts)) for stage, parts in stages.items()]
    return max(found, key=lambda stage: stage.bytes)


def require_memory(found: MemoryEstimate, available: int | None) -> None:
    """Return if the machine has what a run takes, or nothing is known of it.

    Raises:
        ConfigError: It has less.
    """
    if available is not None and found.bytes > available:
        part = found.largest
        raise ConfigError(
            f"this run takes about {size(found.bytes)} of memory at its peak, {size(part.bytes)} of them for "
            f"{part.what}, and {size(available)} are available here: lower {part.key}",
            about=part.key,
            value=round(found.bytes),
        )


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can have, with those that it has; None where the system is not Linux.

    It is the least of what the machine has available and of what the limits of the process's control groups leave. The
    pages of files that a group has read count as free.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in lines)
    left = [1024 * int(rows["MemAvailable"].split()[0]), *_left_in_groups(proc / "self" / "cgroup", groups)]
    held = int((proc / "self" / "statm").read_text().split()[1]) * resource.getpagesize()
    return min(left) + held


def _left_in_groups(own: Path, groups: Path) -> Iterator[int]:
    """What the limit of each control group above the process leaves, in both versions of the interface."""
    for line in own.read_text().splitlines() if own.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, limit, used, files = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = "total_inactive_file"
        else:
            continue
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(root):
                break
            yield from _left(folder, limit, used, files)


def _left(group: Path, limit: str, used: str, files: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text().strip()
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if most != "max":
            yield int(most) - int((group / used).read_text()) + int(rows.get(files, "0"))
    except (OSError, ValueError):  # no such group here, as in a container that sees another root
        return


@dataclass(frozen=True, slots=True)
class _Counts:
    """What the parts follow from: bytes, except for ``asked``, ``cohort`` and ``private``."""

    texts: float
    step: float  # of training
    asked: int  # devices that are asked in any session
    cohort: int
    private: int  # numbers of the adapter that a device may keep for itself

    @classmethod
    def of(cls, scenario: Scenario, population: Population, base: Base) -> "_Counts":
        texts = [text for client in population.clients for text in _texts(client)]
        federation, cohort = scenario.federation, scenario.federation.cohort
        seen = sum(not client.unseen for client in population.clients)
        sessions = math.ceil(federation.rounds / federation.aggregation.session_rounds)
        each = math.ceil(cohort.size * cohort.over_selection)
        shape = _Shape.of(base)
        return cls(
            texts=sum(TEXT + CHARACTER * len(text.text + text.prompt) for text in texts),
            step=shape.step(federation.training.batch_size, _longest(texts, base, scenario), scenario),
            asked=min(seen, each * sessions) if cohort.size else seen,
            cohort=min(seen, cohort.size) if cohort.size else seen,
            private=_private(scenario, shape, len(population.labels)),
        )


@dataclass(frozen=True, slots=True)
class _Shape:
    layers: int
    hidden: int
    heads: int
    vocabulary: int

    @classmethod
    def of(cls, base: Base) -> "_Shape":
        config = AutoConfig.from_pretrained(base.folder)
        return cls(config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)

    def step(self, batch: int, tokens: int, scenario: Scenario) -> float:
        """Bytes of a step of training: what the layers keep for the gradient, and a language model's logits.

        Of a layer, s·b·h·(34 + 5·a·s/h) bytes at 16 bits (Korthikanti et al. 2022, "Reducing Activation Recomputation
        in Large Transformer Models", equation 1), and twice as many at 32. Without dropout it is less.
        """
        states = batch * tokens * self.hidden
        kept = 2 * self.layers * states * (34 + 5 * self.heads * tokens / self.hidden)
        writes = scenario.data.for_language_model
        return kept + (LOGITS * FLOAT * batch * tokens * self.vocabulary if writes else 0)


def _session(scenario: Scenario, counts: _Counts) -> list[MemoryPart]:
    """The devices in the rounds: those that were ever asked, and what those of a session share with each other."""
    federation, cohort = scenario.federation, counts.cohort
    degree = federation.aggregation.masking_graph(cohort).degree
    rounds = min(federation.aggregation.session_rounds, federation.rounds)
    key = "federation.cohort.size" if federation.cohort.size else _population_key(scenario)
    return [
        MemoryPart(f"{counts.asked} devices", counts.asked * (DEVICE + 2 * FLOAT * counts.private), key),
        MemoryPart(f"the keys of {cohort} devices for {rounds} rounds", cohort * degree * rounds * SHARES, key),
    ]


def _private(scenario: Scenario, shape: _Shape, labels: int) -> int:
    """About how many numbers of an adapter a device keeps for itself: none, or all of the adapter."""
    if scenario.federation.method not in ("fedsa", "fedper"):
        return 0
    pairs = 2 * shape.layers  # queries and values
    return pairs * 2 * scenario.adapter.rank * shape.hidden + labels * (shape.hidden + 1)


def _population_key(scenario: Scenario) -> str:
    """The key that says how many clients or texts a population has."""
    if not scenario.data.given:
        return "population.households"
    return "data.sample"


def _texts(client: Client) -> Sequence[LabelledText]:
    return (*client.train, *client.validation, *client.test)


def _longest(texts: Sequence[LabelledText], base: Base, scenario: Scenario) -> int:
    """Tokens of the text with the most characters, as far as it is read."""
    text = max((each.prompt + each.text for each in texts), key=len, default="")
    found = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    found.no_truncation()
    found.no_padding()
    count = len(found.encode(text).ids)
    return count if scenario.data.for_language_model else min(count, MAX_TOKENS)
