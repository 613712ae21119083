"""Which groups of devices there are: what a device contributes, what a sum with noise shows, and the round itself."""

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Privacy, SessionSpec
from client.node.policy import PolicySettings
from client.node.statedir import SETTINGS
from coordinator.settings import FederationSettings
from edgeadapt.bases.base import Base
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds.discovery import (
    LEAST,
    MOST_CELLS,
    NOISE,
    PLACE,
    PRESENT,
    Cells,
    DiscoveryRounds,
    DiscoveryTask,
    found,
)
from edgeadapt.rounds.sums import Bounds, noisy_vector
from export.bundle.sources import from_registry
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from tests.conftest import LABELS, SAID
from tests.support import refused
from tests.support.fleet import session_spec
from tests.support.rollout import StagedFleet, run

HIDDEN, COUNT, FLEET, DIGEST = 32, 24, 240, b"d" * 32
HEAD: Tensors = {
    "classifier.weight": np.zeros((2, HIDDEN), np.float32),
    "classifier.bias": np.zeros(2, np.float32),
    "query.lora_A.weight": np.ones((2, 5), np.float32),
}


def kinds(count: int) -> Floats:
    """Centers of kinds of texts, far from each other."""
    return 4 * np.eye(HIDDEN, dtype=np.float32)[:count] + np.float32(1)


def texts(center: Floats, count: int, rng: np.random.Generator) -> Floats:
    return (center + rng.normal(0, 0.6, (count, HIDDEN))).astype(np.float32)


def public(rng: np.random.Generator, count: int = 4) -> Floats:
    return np.concatenate([texts(center, 40, rng) for center in kinds(count)])


CELLS = Cells.of(public(np.random.default_rng(0)), COUNT)
TASK = DiscoveryTask(PeftConfig("LORA", 2, 4, ("query",)), ("on", "off"), CELLS.encode(), COUNT)


def spec_of(noise: float) -> SessionSpec:
    layout, bounds = Layout.of(HEAD), Bounds(1.0, 1, 32, FLEET, noise)
    vector = TASK.vector(layout, replace(bounds, ring_bits=TASK.ring_bits(layout, bounds)))
    privacy = Privacy(Mechanism.SKELLAM, 20, 1e-6)
    return session_spec(FLEET, **{"vector": vector, "clip_norm": 1.0, "weight_cap": 1, "privacy": privacy})


def summed(fleet: list[Floats], multiplier: float, seed: int) -> dict[str, float]:
    """The metrics of a round over devices with these embeddings."""
    spec = spec_of(multiplier / math.sqrt(len(fleet)))
    total = np.zeros(spec.vector.size, np.uint64)
    for number, own in enumerate(fleet):
        rng, key = np.random.default_rng([seed, number]), bytes([seed, number % 251]) * 8 + number.to_bytes(16, "big")
        total += noisy_vector(CELLS.contributed(own), spec, DIGEST, rng, key).astype(np.uint64)
    width = spec.vector.to_ring(np.zeros(1, np.int64)).dtype
    return TASK.metrics(spec, spec.vector.decode(total.astype(width), len(fleet)), len(fleet), DIGEST)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_found_in_a_sum_with_noise_and_the_router_knows_them(groups: int) -> None:
    rng = np.random.default_rng(groups)
    own = [number % groups for number in range(FLEET)]
    fleet = [texts(kinds(4)[kind], 12, rng) for kind in own]
    seen = found(summed(fleet, 2.3, seed=groups), most=6, smallest=20)
    assert len(seen) == groups
    assert all(abs(one.devices - FLEET / groups) < 40 for one in seen)
    weight, bias = CELLS.router([one.center for one in seen])
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in fleet]
    chosen = [int((each @ weight.T + bias).mean(axis=0).argmax()) for each in unit]
    assert len(set(zip(own, chosen, strict=True))) == groups  # one group for each kind, whatever its number


def test_devices_that_are_alike_are_one_group_and_small_groups_join_another() -> None:
    rng = np.random.default_rng(5)
    mixed = [np.concatenate([texts(center, 4, rng) for center in kinds(4)]) for _ in range(FLEET)]
    assert len(found(summed(mixed, 2.3, seed=5), most=6, smallest=1)) == 1
    uneven = [texts(kinds(4)[int(number < 12)], 12, rng) for number in range(FLEET)]
    assert len(found(summed(uneven, 0.01, seed=6), most=6, smallest=1)) == 2
    assert len(found(summed(uneven, 0.01, seed=6), most=6, smallest=20)) == 1


def test_a_fleet_that_the_noise_hides_is_refused() -> None:
    few = [texts(kinds(4)[0], 12, np.random.default_rng(number)) for number in range(8)]
    with refused(ConfigError, "discovery"):
        found(summed(few, 2.3, seed=1), most=6, smallest=2)


def test_a_contribution_is_one_block_of_norm_1_whatever_the_number_of_texts() -> None:
    rng = np.random.default_rng(3)
    for count in (LEAST, 500):
        vector = CELLS.contributed(texts(kinds(4)[2], count, rng)).reshape(COUNT, COUNT + 1)
        (cell,) = np.flatnonzero(vector.any(axis=1))
        assert vector[cell, 0] == PRESENT
        assert np.linalg.norm(vector) == pytest.approx(1.0)
    assert not CELLS.contributed(texts(kinds(4)[2], LEAST - 1, rng)).any()
    assert CELLS.contributed(np.zeros((0, HIDDEN), np.float32)).shape == (TASK.noisy_size(Layout.of(HEAD)),)


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=HIDDEN, max_size=HIDDEN), min_size=8, max_size=9))
def test_no_contribution_is_longer_than_the_bound(rows: list[list[float]]) -> None:
    assert np.linalg.norm(CELLS.contributed(np.array(rows, np.float32))) <= DiscoveryRounds().bound(9.0, True) + 1e-9


def test_the_noise_is_as_large_as_the_metrics_say() -> None:
    nobody = [np.zeros((0, HIDDEN), np.float32)] * 60
    tables = [summed(nobody, 2.3, seed) for seed in range(4)]
    places = [value for table in tables for name, value in table.items() if name.count(".") == 2 and name[-2:] != ".0"]
    counts = [value for table in tables for name, value in table.items() if name[-2:] == ".0"]
    assert np.std(places) == pytest.approx(tables[0][NOISE], rel=0.12)  # 2,304 numbers
    assert np.std(counts) == pytest.approx(tables[0][NOISE] * PLACE / PRESENT, rel=0.3)  # 96 numbers


def test_cells_are_read_as_they_were_written_and_damaged_ones_are_refused() -> None:
    again = Cells.decode(CELLS.encode(), COUNT)
    assert again.digest == CELLS.digest
    assert np.array_equal(again.mean, CELLS.mean)
    blank = Cells(CELLS.mean, np.zeros((COUNT, HIDDEN))).encode()
    endless = Cells(CELLS.mean, np.full((COUNT, HIDDEN), np.inf)).encode()
    for text in ("", "%", TASK.cells[:-4], blank, endless):
        with refused(ProtocolError, "task.cells"):
            DiscoveryTask.decode(json.dumps(json.loads(TASK.encode()) | {"cells": text}).encode())
    with refused(DataError, "--texts"):
        Cells.of(public(np.random.default_rng(0))[:95], COUNT)
    other = {**HEAD, "classifier.weight": np.zeros((2, 7), np.float32)}
    with refused(DataError, "task.cells"):
        TASK.noisy_size(Layout.of(other))


def test_the_cells_of_a_wide_base_stay_in_the_settings(tmp_path: Path) -> None:
    cells = Cells(np.zeros(1024), np.random.default_rng(0).normal(size=(MOST_CELLS, 1024))).encode()
    asked = FederationSettings().with_counting("discovery", 0, {"cells": cells, "count": MOST_CELLS})
    (tmp_path / "federation.toml").write_text(asked.to_toml())
    assert FederationSettings.read(tmp_path / "federation.toml") == asked


def test_nothing_is_discovered_without_noise_or_without_the_owners_consent() -> None:
    with refused(ConfigError, "noise"):
        TASK.exact_vector(Layout.of(HEAD), Bounds(1.0, 1, 32, FLEET))
    with refused(ProtocolError, "task.observations"):
        PolicySettings().check(TASK, {})
    PolicySettings(observations=True).check(TASK, {})


def test_a_round_finds_the_groups_of_a_fleet_and_a_router_tells_them_apart(
    app_fleet_of: Callable[..., Any], tiny_base: Base, tmp_path: Path
) -> None:
    exported = export_classifier(with_mean_head(tiny_base, ["query", "value"]), tiny_base, Profile.FP32, training=True)
    bare = {"discovery__noise_multiplier": 1e-3, "aggregation__ring_bits": 32}  # a fleet of eight is hidden by more
    staged = StagedFleet.of(app_fleet_of(8, rounds=1, **bare), exported)
    coordinator = staged.fleet.out / "coordinator"
    staged.publish("stable", from_registry(coordinator, 0, None), 1)
    staged.join()
    staged.update()
    for number, device in enumerate(staged.devices):
        state = staged.fleet.state_dir(device)
        table = tomllib.loads((state.folder / SETTINGS).read_text())
        table["policy"] |= {"observations": True, "minimum_evaluation_noise": 1e-4}
        (state.folder / SETTINGS).write_text(tomli_w.dumps(table))
        label = number % 2
        rows = [{"text": SAID[LABELS[label]][k % 5], "label": label, "split": "train"} for k in range(LEAST)]
        state.examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    phrases = tmp_path / "public.txt"
    phrases.write_text("".join(f"{text}\n" for label in LABELS for text in SAID[label]))
    bundle, out = staged.bundle(staged.devices[0]), tmp_path / "router"
    with refused(ConfigError, "discovery"):
        run("coordinator", "groups", coordinator)
    asked = run("coordinator", "discover", coordinator, "--texts", phrases, "--bundle", bundle, "--cells", 3)
    assert "round 2 finds groups by 3 cells" in asked
    staged.fleet.federate(staged.fleet.grid())
    words = ("--texts", phrases, "--bundle", bundle, "--smallest", 2, "--out", out, "--json")
    shown = json.loads(run("coordinator", "groups", coordinator, *words))
    assert [row["devices"] for row in shown["groups"]] == [4, 4]
    assert (out / "labels.txt").read_text() == "group-1\ngroup-2\n"
