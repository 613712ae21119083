"""Masks that other processes take off: bit for bit the same, whatever becomes of those processes."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation import masks, ring
from aggregation.masks import Mask
from coordinator import maskworkers, rounds
from coordinator.maskworkers import MaskWorkers

MASKS = [Mask(hashlib.sha256(bytes([i])).digest(), add=i % 3 > 0) for i in range(7)]


@pytest.fixture(scope="module")
def workers() -> Iterator[MaskWorkers]:
    with MaskWorkers(2) as made:
        yield made


@pytest.mark.parametrize("bits", [24, 32, 48])
@pytest.mark.parametrize("size", [1, 4_099, 300_001])  # shorter than a block, and longer than a pipe holds
@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_result_is_that_of_one_process_bit_for_bit(workers: MaskWorkers, bits: int, size: int, count: int) -> None:
    alone = np.arange(size).astype(ring.dtype(bits))
    helped = alone.copy()
    masks.apply(alone, MASKS[:count])
    workers.apply(helped, iter(MASKS[:count]))
    assert np.array_equal(alone, helped)


def test_each_process_gets_a_share_of_its_own(workers: MaskWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[Mask] = []
    monkeypatch.setattr(masks, "apply", lambda vector, found: here.extend(found))
    workers.apply(ring.zeros(10, 24), MASKS)
    assert here == MASKS[::3]


def test_a_share_that_a_killed_process_had_is_done_here() -> None:
    alone, helped = ring.zeros(50_000, 24), ring.zeros(50_000, 24)
    masks.apply(alone, MASKS)
    with MaskWorkers(1) as made:
        made._workers[0].kill()
        made._workers[0].wait()
        for _ in range(2):
            helped[:] = 0
            made.apply(helped, MASKS)
            assert np.array_equal(alone, helped)


def test_a_share_whose_answer_is_cut_short_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, helped = ring.zeros(5_000, 24), ring.zeros(5_000, 24)
    masks.apply(alone, MASKS)
    with MaskWorkers(1) as made:
        monkeypatch.setattr(made._workers[0], "stdout", io.BytesIO(bytes(100)))
        made.apply(helped, MASKS)
        monkeypatch.undo()
    assert np.array_equal(alone, helped)


def test_no_process_is_left_when_the_block_ends() -> None:
    with MaskWorkers(2) as made:
        assert [worker.poll() for worker in made._workers] == [None, None]
    assert [worker.returncode for worker in made._workers] == [0, 0]


def test_a_module_of_the_same_name_in_the_working_folder_gets_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coordinator").mkdir()
    (tmp_path / "coordinator" / "__init__.py").write_text("")
    (tmp_path / "coordinator" / "maskworkers.py").write_text("open('keys', 'w')")
    monkeypatch.chdir(tmp_path)
    with MaskWorkers(1):
        pass
    assert not (tmp_path / "keys").exists()


def test_a_process_ends_at_half_a_request() -> None:
    answers = io.BytesIO()
    maskworkers.serve(io.BytesIO(b"\x04\x00"), answers)
    assert answers.getvalue() == b""


def test_a_federation_whose_masks_are_shared_out_makes_the_same_adapter(
    fleet_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    class Counted(MaskWorkers):
        def __init__(self, count: int) -> None:
            made.append(count)
            super().__init__(count)

    monkeypatch.setattr(rounds, "MaskWorkers", Counted)
    fleet = fleet_of(5, rounds=1, aggregation__mask_processes=2)
    fleet.federate(fleet.grid())
    alone = fleet_of(5, rounds=1, aggregation__mask_processes=1)
    alone.federate(alone.grid())
    assert made == [1, 0]
    first, second = (f.registry().versions()[-1].manifest for f in (fleet, alone))
    assert first.sha256 == second.sha256
