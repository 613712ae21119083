"""The base that a run trains on: the scenario's, with fewer tokens, centered, or rounded, as the scenario says.

With the engine ``onnx``, devices have it in a bundle with a training graph.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

from adapters.base import Base, find_base
from adapters.bundle import TRUST
from adapters.cache import cached
from adapters.peftconfig import PeftConfig, require_gradients
from adapters.storage import PUBLIC, replace
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.trust import Trust
from client.training.engine import trainer_of
from client.training.trainer import FrozenBase
from export.bundle.write import write_bundle
from export.causal import export_causal
from export.center import centered
from export.onnx.classifier import export_classifier
from export.onnx.dequantize import dequantized
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from export.onnx.targets import SlotKind, Slots
from export.prune import WORDS, frequent_words, prune
from simulations.data.population import Population
from simulations.engine.provision import bundle_of, peft_config
from simulations.scenario import Scenario

KINDS = {  # method → what its adapters bring
    "IA3": frozenset({SlotKind.SCALE, SlotKind.INPUT_SCALE}),
    "BEFT": frozenset({SlotKind.OFFSET}),
    "LN_TUNING": frozenset({SlotKind.NORMS}),
    "PROMPT_TUNING": frozenset({SlotKind.PROMPT}),
    "PREFIX_TUNING": frozenset({SlotKind.PREFIX}),
}
DORA = frozenset({SlotKind.LOW_RANK, SlotKind.SCALE, SlotKind.OFFSET})
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


def device_base(out: Path, scenario: Scenario, base: Base, population: Population) -> FrozenBase:
    """What the devices of the run in ``out`` train on: the base itself, or that of a bundle that is made once.

    Raises:
        ConfigError: The base has no training graph, or the engine trains no such adapter.
    """
    if scenario.base.engine == "torch":
        return base
    config, bundle, labels = peft_config(scenario, base), bundle_of(out), len(population.labels)
    require_gradients(config)
    if not bundle.exists():
        _write(bundle, base, config, Profile(scenario.export.profile), language=not labels)
    verified = Trust.open(bundle).bundle.base()
    trainer_of(verified, labels, config)  # refuses what the devices would
    return verified


def _write(bundle: Path, base: Base, config: PeftConfig, profile: Profile, *, language: bool) -> None:
    """A bundle of the base with slots for such adapters and a training graph, and the key that it is signed with."""
    kinds = DORA if config.use_dora else KINDS.get(config.peft_type, frozenset({SlotKind.LOW_RANK}))
    slots = Slots(config.target_modules, kinds)
    if language:
        exported = export_causal(base, slots, profile, training=True)
    else:
        exported = export_classifier(with_mean_head(base, slots), base, profile, training=True)
    key = IdentityKey.generate(SystemEntropy())
    bundle.parent.mkdir(exist_ok=True)
    replace(bundle.with_name(TRUST), key.public.to_pem(), PUBLIC)
    write_bundle(bundle, exported, [], key=key, once=True)


def _pruned(base: Base, languages: tuple[str, ...]) -> Base:
    """The base with the tokens of these languages. It depends on no run, so it is kept in the cache."""
    source = "\n".join((base.digest, *languages, str(WORDS), version("wordfreq")))

    def make(folder: Path) -> None:
        prune(base, frequent_words(languages, WORDS), [], folder / "base")

    return find_base(str(cached(f"pruned-{hashlib.sha256(source.encode()).hexdigest()[:16]}", make) / "base"))
