"""A coordinator reconstructs a device's picture from its update, or finds it among candidates.

Without masks it does both. From what a device sends with them it does neither. The sum of ten devices shows hardly
more of a picture than a guess, but names the candidate that is in it; noise hides that. ``python -m benchmarks
inversion`` has figures.
"""

from dataclasses import replace

import numpy as np
import pytest

from client.training.examples import Example
from edgeadapt.bases.pictures import picture
from tests.support.crafted import with_noise
from tests.support.inversion import CANDIDATES, COMPARED, OTHERS, Ground, Sight
from tests.support.pictures import make_base, shapes

SEARCHES, TRIALS = 3, 20
CHANCE = 2  # candidates that are found in so many trials, at most: by chance more, of 100, in one of 1000 runs
ALONE, SUM = Sight("one update"), Sight("the sum of a round", devices=10)


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None: ...


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    base = make_base(tmp_path_factory.mktemp("base") / "vit", "vit", positions=20.0)
    count = CANDIDATES + OTHERS + COMPARED
    return Ground.of(base, 0, [Example(picture(shapes(number)), number % 4) for number in range(count)])


def test_one_update_shows_the_picture_and_a_sum_of_ten_hardly_more_than_a_guess(ground: Ground) -> None:
    one, summed = (ground.attack(sight, SEARCHES, SEARCHES, 90) for sight in (ALONE, SUM))
    guess = np.median(ground.means(SEARCHES).psnr)
    assert np.median(one.psnr) > guess + 6  # dB: half the error
    assert np.median(summed.psnr) < guess + 1.5


def test_one_update_names_the_candidate_and_what_the_same_device_sends_does_not(ground: Ground) -> None:
    assert ground.attack(ALONE, TRIALS).found == TRIALS
    assert ground.attack(replace(SUM, masked=True), TRIALS).found <= CHANCE


def test_a_sum_of_ten_names_the_candidate_unless_it_has_noise(ground: Ground) -> None:
    assert ground.attack(SUM, TRIALS).found > TRIALS / 2
    assert ground.attack(replace(SUM, settings=with_noise(1.0)), TRIALS).found <= CHANCE
