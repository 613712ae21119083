"""A provisioned fleet: each folder has what its owner needs and no secret of another."""

import stat
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey
from client.training.engine import classifier_trainer
from client.training.examples import Split, in_split, read_examples
from edgeadapt.formats import files
from edgeadapt.methods.classifier import HEAD_SCALE
from simulations.engine import provision
from tests.support import FleetOf


@pytest.fixture
def fleet(fleet_of: FleetOf) -> Any:
    return fleet_of(4, unseen=1)


def test_every_client_has_a_device_with_its_own_certified_identity(fleet: Any) -> None:
    state_dirs = {client.name: fleet.state_dir(client.name) for client in fleet.population.clients}
    root, keys = Root.from_pem((fleet.out / "coordinator" / "authority.pem").read_bytes()), set()
    for name, state_dir in state_dirs.items():
        device = state_dir.device(fleet.base.digest)
        assert root.verify(device.certificate, datetime.now(UTC)) == (name, device.identity.public)
        keys.add(device.identity.raw)
    assert len(state_dirs) == len(keys) == 5


def test_a_device_has_its_clients_examples_in_their_parts(fleet: Any) -> None:
    for client in fleet.population.clients:
        found = read_examples(fleet.state_dir(client.name).examples, len(fleet.population.labels))
        for wanted, phrases in (
            (Split.TRAIN, client.train),
            (Split.VALIDATION, client.validation),
            (Split.TEST, client.test),
        ):
            assert [(e.text, e.label) for e in in_split(found, wanted)] == [(p.text, p.label) for p in phrases]


def test_the_registry_begins_with_the_vendors_seed_adapter(fleet: Any) -> None:
    registry = fleet.registry()
    (version,) = registry.versions()
    manifest, tensors = version.manifest, registry.tensors(0)
    assert (manifest.version, manifest.round, manifest.parent, manifest.survivors) == (0, 0, None, ())
    assert (manifest.base_digest, manifest.labels) == (fleet.base.digest, fleet.population.labels)
    mine = classifier_trainer(fleet.base, len(manifest.labels), provision.peft_config(fleet.scenario, fleet.base))
    assert manifest.layout_digest == mine.layout.digest
    head = next(value for name, value in tensors.items() if name.endswith("classifier.weight"))
    assert np.allclose(np.linalg.norm(head, axis=1), HEAD_SCALE, rtol=1e-5)
    public = [phrase.text for phrase in fleet.population.public]
    assert mine.logits(tensors, public).argmax(1).tolist() == [phrase.label for phrase in fleet.population.public]


def test_a_logistic_head_answers_the_public_phrases_with_the_least_loss(fleet: Any) -> None:
    population, base = fleet.population, fleet.base
    public, labels = zip(*[(phrase.text, phrase.label) for phrase in population.public], strict=True)

    def loss(head: str) -> tuple[float, set[str]]:
        chosen = fleet.scenario.model_copy(update={"adapter": fleet.scenario.adapter.model_copy(update={"head": head})})
        manifest, blob = provision.first_adapter(chosen, population, base)
        mine, tensors = (
            classifier_trainer(base, len(population.labels), provision.peft_config(chosen, base)),
            files.decode(blob),
        )
        assert manifest.layout_digest == mine.layout.digest
        logits = torch.from_numpy(mine.logits(tensors, public))
        weight = next(value for name, value in tensors.items() if name.endswith("classifier.weight"))
        penalty = provision.PENALTY / 2 * float((weight**2).sum())
        other = {name for name, value in tensors.items() if "lora" in name and value.any()}
        return float(cross_entropy(logits, torch.tensor(labels), reduction="sum")) + penalty, other

    (fitted, drawn), (nearest, same) = loss("logistic"), loss("prototypes")
    assert fitted < nearest
    assert drawn == same  # LoRA changes nothing yet


def test_the_seed_determines_the_seed_adapter_the_order_of_training_and_no_other_secret(fleet_of: FleetOf) -> None:
    fleets = [fleet_of(3, seed=seed) for seed in (0, 0, 1)]
    digests = [fleet.registry().version(0).manifest.sha256 for fleet in fleets]
    assert digests[0] == digests[1] != digests[2]
    for name in ("coordinator/signing.pem", "devices/device-00/identity.pem", "devices/device-00/sealing.key"):
        assert len({(fleet.out / name).read_bytes() for fleet in fleets}) == 3
    keys = [[(fleet.out / f"devices/device-0{n}/simulation.seed").read_bytes() for n in range(3)] for fleet in fleets]
    assert keys[0] == keys[1]
    assert len({*keys[0], *keys[2]}) == 6


def test_each_secret_is_in_the_folder_of_its_owner_only(fleet: Any) -> None:
    secrets = {fleet.out / "authority": (fleet.out / "authority" / "authority.pem").read_bytes()}
    secrets[fleet.out / "coordinator"] = (fleet.out / "coordinator" / "signing.pem").read_bytes()
    for client in fleet.population.clients:
        folder = fleet.state_dir(client.name).folder
        secrets[folder] = (folder / "identity.pem").read_bytes()
    files = [path for path in fleet.out.rglob("*") if path.is_file()]
    for owner, secret in secrets.items():
        assert b"PRIVATE KEY" in secret
        private = secret[secret.index(b"-----BEGIN PRIVATE") :]
        found = [path for path in files if private.strip() in path.read_bytes()]
        assert [path.parent for path in found] == [owner]
        assert stat.S_IMODE(found[0].stat().st_mode) == 0o600


def test_no_phrase_of_a_client_is_outside_its_state_directory(fleet: Any) -> None:
    public = {phrase.text for phrase in fleet.population.public}
    for client in fleet.population.clients:
        folder = fleet.state_dir(client.name).folder
        others = [p for p in fleet.out.rglob("*") if p.is_file() and fleet.out / "devices" not in p.parents]
        phrases = {e.text for e in client.train + client.validation + client.test} - public
        assert phrases
        assert not [p for p in others for text in phrases if text.encode() in p.read_bytes()]
        assert folder.joinpath("examples.jsonl").is_file()


@pytest.mark.parametrize(("devices", "cohort", "survivors"), [(3, 3, 2), (9, 7, 4), (12, 8, 4)])
def test_a_device_has_the_default_minima_unless_its_fleet_is_smaller(
    fleet_of: FleetOf, devices: int, cohort: int, survivors: int
) -> None:
    policy = fleet_of(devices).state_dir("device-00").settings.policy
    assert (policy.minimum_cohort, policy.minimum_survivors) == (cohort, survivors)


def test_a_device_trusts_bundles_of_the_coordinator_and_of_itself(fleet: Any) -> None:
    trust = (fleet.state_dir("device-00").folder / "trust.pem").read_bytes()
    coordinator = IdentityKey.from_pem((fleet.out / "coordinator" / "signing.pem").read_bytes())
    own = IdentityKey.from_pem((fleet.state_dir("device-00").folder / "identity.pem").read_bytes())
    assert trust == coordinator.public.to_pem() + own.public.to_pem()
