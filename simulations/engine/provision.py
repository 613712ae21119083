"""Make a fleet: an authority, a coordinator with the vendor's seed adapter, and a home for every household's device.

It does what enrolment does in the field, in one place: each device makes its own identity, the authority certifies it,
and the device pins the authority and the coordinator. From here on the folders are all that the apps know.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from cryptography import x509

from adapters import files
from adapters.base import Base
from adapters.classifier import LoraSpec, seed_adapter
from adapters.layout import Layout
from adapters.manifest import VersionManifest
from adapters.peftconfig import PeftConfig
from adapters.storage import replace
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from client.node import statedir as device_files
from client.node.policy import PolicySettings
from client.node.statedir import DeviceSettings, DeviceStateDir
from client.training.examples import Example, Split, write_examples
from client.training.trainer import load_trainer
from coordinator import statedir as coordinator_home
from coordinator.registry import Registry
from coordinator.settings import SETTINGS
from coordinator.statedir import open_registry
from simulations.data.households import Household, Population
from simulations.scenario import Scenario

AUTHORITY = "authority"
COORDINATOR = "coordinator"
DEVICES = "devices"
LIFETIME = timedelta(days=365)
SMALLEST_POLICY = 8  # a simulated device keeps the default policy's smallest cohort unless its fleet is smaller


def lora(scenario: Scenario) -> LoraSpec:
    """The scenario's adapter as the classifier's own type."""
    return LoraSpec(scenario.adapter.rank, scenario.adapter.alpha, scenario.adapter.targets)


def device_folder(out: Path, household: str) -> Path:
    """Where a household's device lives."""
    return out / DEVICES / household


def provision(out: Path, scenario: Scenario, population: Population, base: Base) -> None:
    """Write every folder of the fleet below ``out``."""
    entropy, now = SystemEntropy(), datetime.now(UTC)
    authority = Authority.create("edgeadapt simulation", entropy, now - timedelta(hours=1), now + LIFETIME)
    (out / AUTHORITY).mkdir(parents=True)
    replace(out / AUTHORITY / "authority.pem", authority.to_pem())
    key = IdentityKey.generate(entropy)
    _coordinator(out / COORDINATOR, scenario, population, base, key, authority)
    fleet = sum(not household.unseen for household in population.households)
    for household in population.households:
        identity = IdentityKey.generate(entropy)
        certificate = authority.issue(
            household.name,
            identity.public,
            not_before=now - timedelta(hours=1),
            not_after=now + LIFETIME,
            serial=x509.random_serial_number(),
        )
        trust = {
            device_files.CERTIFICATE: certificate,
            device_files.AUTHORITY: authority.root.to_pem(),
            device_files.COORDINATOR: key.public.to_pem(),
            # Whose files this device opens: the coordinator's, and its own private adapter's.
            device_files.TRUST: key.public.to_pem() + identity.public.to_pem(),
        }
        policy = PolicySettings(
            minimum_cohort=max(3, min(SMALLEST_POLICY, fleet - 2)),
            adversaries=sorted({"active", scenario.federation.aggregation.adversary}),
        )
        settings = DeviceSettings(base=_base_name(scenario, base), policy=policy)
        state_dir = DeviceStateDir.create(device_folder(out, household.name), settings, identity, trust, entropy)
        write_examples(state_dir.examples, _examples(household))


def open_state_dirs(out: Path, population: Population) -> dict[str, DeviceStateDir]:
    """Household → its device's home."""
    return {h.name: DeviceStateDir.open(device_folder(out, h.name)) for h in population.households}


def registry(out: Path) -> Registry:
    """The registry of the fleet's coordinator."""
    folder = out / COORDINATOR
    return open_registry(folder, IdentityKey.from_pem((folder / coordinator_home.KEY).read_bytes()))


def _base_name(scenario: Scenario, base: Base) -> str:
    """How a device finds its base: as the scenario says, or in the run's folder if the run has rounded it."""
    return str(base.folder) if scenario.export.train_on_dequantized else scenario.base.model


def _coordinator(
    folder: Path, scenario: Scenario, population: Population, base: Base, key: IdentityKey, authority: Authority
) -> None:
    folder.mkdir(parents=True)
    replace(folder / coordinator_home.KEY, key.to_pem())
    replace(folder / coordinator_home.AUTHORITY, authority.root.to_pem())
    settings = scenario.federation.model_copy(update={"seed": scenario.seed})
    replace(folder / SETTINGS, settings.to_toml().encode())
    mine = load_trainer(base, len(population.labels), lora(scenario))
    public = [(phrase.text, phrase.label) for phrase in population.public]
    generator = torch.Generator().manual_seed(scenario.seed)
    tensors = seed_adapter(mine.model, mine.tokenizer, public, len(population.labels), generator)
    blob = files.encode(tensors)
    manifest = VersionManifest(
        version=0,
        sha256=files.sha256(blob),
        size=len(blob),
        base_digest=base.digest,
        layout_digest=Layout.of(tensors).digest,
        parent=None,
        round=0,
        survivors=(),
        metrics={},
        peft_config=PeftConfig("LORA", scenario.adapter.rank, scenario.adapter.alpha, scenario.adapter.targets),
        labels=population.labels,
    )
    open_registry(folder, key).publish(manifest, blob, key)


def _examples(household: Household) -> list[Example]:
    parts = {Split.TRAIN: household.train, Split.VALIDATION: household.validation, Split.TEST: household.test}
    return [Example(phrase.text, phrase.label, part) for part, phrases in parts.items() for phrase in phrases]
