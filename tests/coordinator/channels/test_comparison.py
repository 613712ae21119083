"""A share at which one of two releases is expected on a few devices only is refused."""

import pytest

from adapters.rollout import Rollout
from aggregation.errors import ConfigError
from coordinator.channels.comparison import require_both_likely
from tests.support import refused


@pytest.mark.parametrize(
    ("share", "devices", "languages"),
    [(50, 8, ()), (10, 40, ()), (90, 40, ()), (50, 4, ()), (1, 400, ()), (100, 40, ("de",)), (96, 40, ("de",))],
)
def test_a_share_at_which_both_are_likely(share: int, devices: int, languages: tuple[str, ...]) -> None:
    require_both_likely(Rollout(2, 1, share, languages), devices)


@pytest.mark.parametrize(
    ("share", "devices", "languages"),
    [(49, 8, ()), (51, 8, ()), (9, 40, ()), (91, 40, ()), (0, 1000, ()), (25, 4, ()), (9, 40, ("de",))],
)
def test_a_share_at_which_one_is_not(share: int, devices: int, languages: tuple[str, ...]) -> None:
    with refused(ConfigError, "share", value=share):
        require_both_likely(Rollout(2, 1, share, languages), devices)
