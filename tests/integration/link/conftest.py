"""A link state of Flower with three nodes."""

import pytest

from tests.support.flowerlink import Link, link_of


@pytest.fixture
def link() -> Link:
    return link_of(3)
