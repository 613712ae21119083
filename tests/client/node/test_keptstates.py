"""A device keeps the states of the texts that it trains on, encrypted, and computes again what it cannot read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from client.node.statedir import SEALING_KEY, STATES, DeviceSettings, DeviceStateDir
from edgeadapt.bases.states import StateCache
from edgeadapt.formats.layout import Floats
from edgeadapt.methods.frozen import FrozenLayers
from tests.client.node.test_app import FIRST, Talk, talk

__all__ = ["talk"]
SOURCE = "a" * 64


def compute(texts: list[Sequence[int]]) -> list[Floats]:
    return [np.full((len(text), 4), 0.7, np.float32) for text in texts]


def fails(texts: list[Sequence[int]]) -> list[Floats]:
    raise AssertionError(texts)


@pytest.fixture
def device(tmp_path: Path) -> DeviceStateDir:
    entropy = SystemEntropy()
    made = DeviceStateDir.create(tmp_path, DeviceSettings(base="x"), IdentityKey.generate(entropy), {}, entropy)
    cache = StateCache(1 << 20, source=SOURCE)
    made.states().load(cache)
    cache.rows([[1, 2], [3]], compute)
    made.states().save(cache)
    return made


def loaded(device: DeviceStateDir, source: str = SOURCE) -> StateCache:
    cache = StateCache(1 << 20, source=source)
    device.states().load(cache)
    return cache


def test_states_are_kept_encrypted_until_the_device_forgets(device: DeviceStateDir) -> None:
    (row,) = loaded(device).rows([[3]], fails)
    np.testing.assert_array_equal(row, compute([[3]])[0])
    assert np.full(4, 0.7, np.float32).tobytes() not in (device.folder / STATES).read_bytes()
    device.forget()
    assert not (device.folder / STATES).exists()
    with pytest.raises(AssertionError):
        loaded(device).rows([[3]], fails)


def test_those_of_a_text_that_was_not_trained_on_again_are_gone(device: DeviceStateDir) -> None:
    cache = loaded(device)
    cache.rows([[3]], fails)
    device.states().save(cache)
    assert len(loaded(device).rows([[3]], fails)) == 1
    with pytest.raises(AssertionError):
        loaded(device).rows([[1, 2]], fails)


@pytest.mark.parametrize("damage", ["source", "byte", "key", "end"])
def test_what_cannot_be_read_or_is_of_another_base_is_computed_again(device: DeviceStateDir, damage: str) -> None:
    file = device.folder / STATES
    content = bytearray(file.read_bytes())
    if damage == "byte":
        content[-1] ^= 1
    if damage == "key":
        (device.folder / SEALING_KEY).write_bytes(bytes(32))
    file.write_bytes(content[: 40 if damage == "end" else None])
    cache = loaded(device, "b" * 64 if damage == "source" else SOURCE)
    assert len(cache.rows([[3]], compute)) == 1
    with pytest.raises(AssertionError):
        cache.rows([[1, 2]], fails)


@pytest.mark.parametrize("talk", [{"adapter": {"layers": 1}}], indirect=True)
def test_the_next_training_of_a_device_computes_no_states(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, states = list[Sequence[int]](), FrozenLayers.states

    def counted(self: FrozenLayers, tokens: Sequence[Sequence[int]]) -> list[Floats]:
        texts.extend(tokens)
        return states(self, tokens)

    monkeypatch.setattr(FrozenLayers, "states", counted)
    for asked in range(2):
        _, plans = talk.plan(talk.established())
        talk.ask(FIRST, Step.PLAN, plans[FIRST], adapter=talk.adapter)
        assert (talk.fleet.out / "devices" / FIRST / STATES).exists()
        assert bool(texts) is not bool(asked)
        texts.clear()
