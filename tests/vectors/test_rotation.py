"""The rotation is bit for bit that of the independent script ``make_rotation.py``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation import rotation

VECTORS = json.loads(Path(__file__).with_name("rotation.json").read_text())


def numbers(hexes: list[str]) -> Any:
    return np.array([float.fromhex(each) for each in hexes])


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: len(case["vector"]))
def test_a_vector_is_rotated_and_rotated_back_to_the_same_bits(case: dict[str, Any]) -> None:
    seed, vector = rotation.seed(bytes.fromhex(case["adapter"])), numbers(case["vector"])
    assert seed.hex() == case["seed"]
    assert rotation.rotate(vector, seed).tobytes() == numbers(case["rotated"]).tobytes()
    assert rotation.rotate_back(vector, seed).tobytes() == numbers(case["rotated_back"]).tobytes()


def test_the_bound_of_a_coordinate_has_the_same_bits() -> None:
    assert {size: rotation.peak(int(size)).hex() for size in VECTORS["peaks"]} == VECTORS["peaks"]
