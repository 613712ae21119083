"""What a federation is told: each key has a meaning, and what cannot be is refused before a round begins."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adapters.layout import Layout, TensorSpec
from aggregation.errors import ConfigError
from aggregation.policy import Policy
from aggregation.spec import Adversary
from coordinator.optimizer import FedAdam, FedAvg
from coordinator.settings import Aggregation, FederationSettings, Server

LAYOUT = Layout((TensorSpec("a", (100, 10)),))
BASE = "b" * 64


def fields(model: type[BaseModel] = FederationSettings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def write(folder: Path, settings: Any) -> Path:
    path = folder / "federation.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


@pytest.mark.parametrize(("key", "info"), fields(), ids=[key for key, _ in fields()])
def test_every_key_has_a_description_a_default_and_a_bound_that_refuses(key: str, info: FieldInfo) -> None:
    assert info.description
    assert not info.is_required()


@pytest.mark.parametrize(
    "key", [key for key, info in fields() if info.annotation in (int, float) and not key.endswith("seed")]
)
def test_every_number_is_bounded_and_finite(tmp_path: Path, key: str) -> None:
    for value in (-1, float("inf"), float("nan"), "1", True, None):
        settings: Any = value
        for name in reversed(key.split(".")):
            settings = {name: settings}
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            FederationSettings.read(write(tmp_path, settings))


@pytest.mark.parametrize("section", ["", "training", "server", "aggregation"])
def test_an_unknown_key_is_refused_by_name(tmp_path: Path, section: str) -> None:
    settings = {section: {"extra": 1}} if section else {"extra": 1}
    with pytest.raises(ConfigError, match=f"{section}.?extra") as caught:
        FederationSettings.read(write(tmp_path, settings))
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no federation\.json"):
        FederationSettings.read(tmp_path / "federation.json")
    for text in ("", "{", "[]", "rounds = 3"):
        with pytest.raises(ConfigError, match=r"federation\.json"):
            FederationSettings.read(write(tmp_path, text))


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    settings = FederationSettings(rounds=7, deadline=1.5, server=Server(optimizer="fedadam"))
    assert FederationSettings.read(write(tmp_path, settings.model_dump_json())) == settings


def test_the_server_section_is_the_optimizers_own_settings() -> None:
    assert Server(learning_rate=0.5).rule() == FedAvg(0.5)
    adam = Server(optimizer="fedadam", learning_rate=0.1, beta1=0.5, beta2=0.6, tau=0.01)
    assert adam.rule() == FedAdam(0.1, 0.5, 0.6, 0.01)


@pytest.mark.parametrize("devices", [8, 12, 15, 100, 128])
def test_the_default_offer_is_one_that_the_default_device_accepts(devices: int) -> None:
    spec = Aggregation().spec(devices, LAYOUT, BASE, 4)
    Policy(known_bases=frozenset({BASE})).check(spec, devices)
    assert spec.adversary is Adversary.ACTIVE
    assert spec.degree == devices - 1
    assert spec.minimum_survivors >= spec.threshold


def test_the_minimum_of_survivors_is_a_share_of_the_cohort_but_never_below_the_threshold() -> None:
    for share, expected in ((0.01, 8), (0.5, 8), (0.75, 9), (1.0, 12)):
        assert Aggregation(minimum_survivors=share).spec(12, LAYOUT, BASE, 1).minimum_survivors == expected


def test_a_ring_that_could_wrap_or_miscount_is_refused() -> None:
    with pytest.raises(ConfigError, match="a ring of 16 bits cannot count 128 examples of each of 400 devices"):
        Aggregation(ring_bits=16).spec(400, LAYOUT, BASE, 1)
    with pytest.raises(ConfigError, match="a ring of 16 bits"):
        Aggregation(ring_bits=16).spec(2**16, LAYOUT, BASE, 1)


def test_the_weaker_adversary_is_offered_only_where_it_is_named() -> None:
    weaker = Aggregation(adversary="honest-but-curious").spec(8, LAYOUT, BASE, 1)
    assert weaker.adversary is Adversary.HONEST_BUT_CURIOUS
