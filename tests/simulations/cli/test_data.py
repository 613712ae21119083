"""`edgeadapt simulate look`, and mistakes in a table of one's own."""

import json
from pathlib import Path

import pytest

import simulations
from tests.simulations.data.test_tables import rows, write_csv
from tests.support import Run


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "My Texts.csv", rows())


def test_the_clients_of_a_table_are_shown(run: Run, table: Path) -> None:
    code, out, err = run(
        "simulate", "look", table, "--set", "data.client=user", "--set", "data.language=lang", "--clients"
    )
    assert (code, err) == (0, "")
    assert "8, 2 of them unseen" in out
    assert "de 4, en 4" in out
    assert out.count("user-") >= 8
    dealt = run("simulate", "look", table, "--set", "data.clients=6", "--set", "data.minimum_texts=3")[1]
    assert ["dealt out to them: name the column" in text for text in (out, dealt)] == [False, True]


def test_with_json_the_same_is_one_object_and_broken_rows_are_listed(run: Run, tmp_path: Path) -> None:
    made = rows()
    made[5]["text"] = ""
    path = write_csv(tmp_path / "texts.csv", made)
    code, out, _ = run("simulate", "look", path, "--set", "data.client=user", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["facts"]["broken"] == [f"{path}:7: text is empty"]
    assert len(found["clients"]) == 8
    assert set(found["labels"]) == {"greet", "part", "ask"}
    assert found["unknown"] == 0


GERMAN = "schalte bitte das Licht im Wohnzimmer aus und mach die Heizung im Schlafzimmer etwas wärmer"


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        (" ".join(chr(0x1200 + 7 * number) * 3 for number in range(15)), "of the tokens, at most 100.0 %"),
        (GERMAN, "the words of 8 of 8 clients are spelled out"),
        ("", ""),
    ],
    ids=["unknown letters", "unknown words", "English"],
)
def test_a_language_that_the_base_cannot_read_is_said(run: Run, tmp_path: Path, sentence: str, said: str) -> None:
    made, words = rows(each=20), sentence.split()
    for number, row in enumerate(made if words else ()):
        row["text"] = " ".join(words[(number * step) % len(words)] for step in (1, 2, 4, 7, 11))
    path = write_csv(tmp_path / "texts.csv", made)
    code, out, _ = run("simulate", "look", path, "--set", "data.client=user", "--set", "data.near_duplicates=1")
    assert code == 0
    assert said in out
    assert ("this base hardly reads them" in out) is bool(words)


def test_what_is_shipped_is_listed_and_named_where_a_name_is_mistyped(run: Run) -> None:
    code, out, err = run("simulate", "look", "--json")
    assert (code, err) == (0, "")
    for kind, command in (("scenarios", "run"), ("suites", "suite")):
        shipped = json.loads(out)[kind]
        assert sorted(shipped) == sorted(path.name for path in (Path(simulations.__file__).parent / kind).iterdir())
        assert min(map(len, shipped.values())) > 20
        code, _, err = run("simulate", command, "household.toml")
        assert (code, err.count("\n")) == (2, 1)
        assert "household.toml" in err
        assert ", ".join(shipped) in err
