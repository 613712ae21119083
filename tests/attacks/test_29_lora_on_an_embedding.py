"""A coordinator lets the devices adapt the embedding of tokens, to read from the sum which tokens their examples have.

The LoRA matrix of an embedding has a column for each token of the vocabulary. A device that has no example with a token
leaves its column as it was. So a column of the sum is zero if and only if no survivor has the token.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from aggregation import rotation
from aggregation.errors import ConfigError
from client.training.engine import classifier_trainer
from coordinator import rounds
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import PeftConfig, VersionManifest
from edgeadapt.formats.peftconfig import TRAINABLE
from edgeadapt.methods import classifier, trainable
from simulations.engine import provision
from tests.support import FleetOf, refused

DEVICES, RANK = 8, 2
EMBEDDING = ("word_embeddings",)
ADAPTED = ".embeddings.word_embeddings.lora_embedding_A"


@pytest.fixture(autouse=True)
def no_trainer_of_another_test() -> Iterator[None]:
    """A trainer stays loaded, and with it what was allowed when it was built."""
    classifier_trainer.cache_clear()
    yield
    classifier_trainer.cache_clear()


def first_version(tensors: Tensors, _: PeftConfig, labels: Sequence[str], base: str) -> tuple[VersionManifest, bytes]:
    """As ``seed_version``, which refuses such an adapter."""
    blob, layout = files.encode(tensors), Layout.of(tensors).digest
    config = PeftConfig("LORA", RANK, 4, EMBEDDING)
    return VersionManifest(
        0, files.sha256(blob), len(blob), base, layout, None, 0, None, None, None, (), {}, None, config, tuple(labels)
    ), blob


def attacked(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, *, checked: bool) -> tuple[Any, Any, list[Any]]:
    """A fleet of that coordinator, the record of its first round, and the sums that the coordinator learned."""
    reach, sums = rounds.within_reach, list[Any]()
    with pytest.MonkeyPatch.context() as hostile:
        hostile.setattr(trainable, "_require_kinds", lambda model, config: None)
        hostile.setattr(provision, "peft_config", lambda scenario, base: PeftConfig.lora(RANK, 4, EMBEDDING))
        hostile.setattr(provision, "seed_version", first_version)
        fleet = app_fleet_of(DEVICES, rounds=1, aggregation__ring_bits=32)
    classifier_trainer.cache_clear()

    def learned(session: Any, result: Any) -> Any:
        sums.append(result.values["delta"])
        return reach(session, result)

    monkeypatch.setattr(rounds, "within_reach", learned)
    if not checked:
        monkeypatch.setattr(trainable, "_require_kinds", lambda model, config: None)
    (record,) = fleet.federate(fleet.grid())
    return fleet, record, sums


def tokens_of(fleet: Any) -> set[int]:
    """The tokens of all examples that the devices train on."""
    read = classifier_trainer(fleet.base, len(fleet.population.labels), PeftConfig.lora(RANK, 4)).tokenizer
    texts = [phrase.text for home in fleet.population.clients if not home.unseen for phrase in home.train]
    return {token for encoding in read.encode_batch(texts) for token in encoding.ids}


def test_devices_that_train_an_embedding_reveal_the_tokens_of_their_examples(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, record, (total,) = attacked(app_fleet_of, monkeypatch, checked=False)
    assert record.version == 1
    layout, manifest = Layout.of(fleet.registry().tensors(0)), fleet.registry().version(0).manifest
    total = rotation.rotate_back(total, rotation.seed(bytes.fromhex(manifest.sha256)))
    (name,) = (spec.name for spec in layout.tensors if spec.name.endswith(ADAPTED))
    columns = layout.unflatten(total.astype(np.float32))[name]
    moved = np.abs(columns).max(0) > 1e-3  # in a ring of 32 bits, rounding errors are far below
    assert set(np.flatnonzero(moved).tolist()) == tokens_of(fleet)


def test_every_device_refuses_to_train_an_embedding(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, record, sums = attacked(app_fleet_of, monkeypatch, checked=True)
    assert (record.version, record.survivors, sums) == (None, (), [])
    assert set(record.dropped) == {f"device-{number:02d}" for number in range(DEVICES)}
    assert "word_embeddings, which is not a linear layer" in caplog.text


@pytest.mark.parametrize("target", ["word_embeddings", "position_embeddings", "token_type_embeddings"])
@pytest.mark.parametrize("method", ["LORA", "ADALORA", "LOHA", "VERA", "IA3", "BEFT", "LN_TUNING", "BOTTLENECK"])
def test_no_embedding_is_adapted_by_any_method(tiny_base: Any, method: Any, target: str) -> None:
    rank, alpha = (RANK if name in TRAINABLE[method] else 0 for name in ("r", "lora_alpha"))
    others = "LayerNorm" if method == "LN_TUNING" else "query"
    with refused(ConfigError, "target_modules", value=target):
        classifier.build(tiny_base, 3, PeftConfig(method, rank, alpha, (others, target)))
