"""The base that a run trains on: the scenario's, with fewer tokens, centered, or rounded, as the scenario says."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from adapters.base import Base, find_base
from adapters.cache import cached
from export.center import centered
from export.onnx.dequantize import dequantized
from export.onnx.exported import Profile
from export.prune import WORDS, frequent_words, prune
from simulations.data.population import Population
from simulations.scenario import Scenario

CENTERED = "centered"  # folders in that of the run
DEQUANTIZED = "base"


def training_base(out: Path, scenario: Scenario, population: Population) -> Base:
    """The base of the run in ``out``; what has to be made is made once.

    Raises:
        ConfigError: There is no such base, or as ``frequent_words``, ``prune`` and ``centered``.
    """
    base, export = unrounded_base(scenario), scenario.export
    if scenario.base.center:
        copy = out / CENTERED
        base = find_base(str(copy)) if copy.exists() else centered(base, [u.text for u in population.public], copy)
    if export.train_on_dequantized:
        copy = out / DEQUANTIZED
        base = find_base(str(copy)) if copy.exists() else dequantized(base, Profile(export.profile), copy)
    return base


def unrounded_base(scenario: Scenario) -> Base:
    """The base before it is centered and rounded, which change no size. It is in no run's folder.

    Raises:
        ConfigError: As ``training_base``.
    """
    base = find_base(scenario.base.model)
    return _pruned(base, scenario.base.languages) if scenario.base.languages else base


def _pruned(base: Base, languages: tuple[str, ...]) -> Base:
    """The base with the tokens of these languages. It depends on no run, so it is kept in the cache."""
    source = "\n".join((base.digest, *languages, str(WORDS), version("wordfreq")))

    def make(folder: Path) -> None:
        prune(base, frequent_words(languages, WORDS), [], folder / "base")

    return find_base(str(cached(f"pruned-{hashlib.sha256(source.encode()).hexdigest()[:16]}", make) / "base"))
