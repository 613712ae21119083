"""Settings in TOML: what is written is read back, and what is wrong is refused by its key."""

import json
import os
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from aggregation.errors import ConfigError, TrustError
from edgeadapt.formats.release import MAX_FLAGS, Rollout, check_language, murmur3
from edgeadapt.formats.settings import Settings, overridden, toml_value
from tests.support import refused


class Inner(Settings):
    """Of the second level."""

    rate: float = Field(default=0.5, gt=0, description="learning rate")
    names: tuple[str, ...] = Field(default=(), description="a list")


class Outer(Settings):
    """Of the first level."""

    count: int = Field(default=3, ge=1, description="rounds")
    name: str = Field(default="x", description="a text")
    inner: Inner = Inner()


texts = st.text(st.characters(exclude_categories=["Cs"]))
outers = st.builds(
    Outer,
    count=st.integers(1, 2**62),
    name=texts,
    inner=st.builds(
        Inner,
        rate=st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False),
        names=st.lists(texts, max_size=3).map(tuple),
    ),
)


@given(outers)
def test_settings_are_read_as_they_were_written(settings: Outer) -> None:
    assert Outer.parse(tomllib.loads(settings.to_toml()), "test") == settings


def test_a_file_has_each_key_with_its_comment() -> None:
    assert Outer().to_toml().splitlines() == [
        "count = 3  # rounds",
        'name = "x"  # a text',
        "",
        "[inner]  # Of the second level.",
        "rate = 0.5  # learning rate",
        "names = []  # a list",
    ]


@given(st.recursive(st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_a_value_in_toml_is_one_line_and_the_same_value(value: Any) -> None:
    line = f"value = {toml_value(value)}"
    assert "\n" not in line
    assert tomllib.loads(line) == {"value": value}


@pytest.mark.parametrize(
    ("table", "about", "hint"),
    [
        ({"cuont": 3}, "cuont", "did you mean 'count'?"),
        ({"inner": {"rat": 1.0}}, "inner.rat", "did you mean 'inner.rate'?"),
        ({"zzz": 1}, "zzz", ""),
        ({"count": 0}, "count", ""),
        ({"count": True}, "count", ""),
        ({"count": "3"}, "count", ""),
        ({"inner": {"rate": float("nan")}}, "inner.rate", ""),
        ({"inner": {"rate": float("inf")}}, "inner.rate", ""),
        ({"inner": 3}, "inner", ""),
    ],
    ids=str,
)
def test_a_wrong_key_or_value_is_refused_by_its_key(table: dict[str, Any], about: str, hint: str) -> None:
    with refused(ConfigError, about) as caught:
        Outer.parse(table, "some.toml")
    assert str(caught.value).startswith("some.toml: ")
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize("content", [b"count", b"[inner", b"count = 3\ncount = 4", b"name = '\xff'"], ids=str)
def test_a_file_that_is_not_toml_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.toml").write_bytes(content)
    with refused(ConfigError, "some.toml"):
        Outer.read(tmp_path / "some.toml")


def test_a_file_that_is_missing_or_a_folder_is_refused_by_its_name(tmp_path: Path) -> None:
    for path in (tmp_path / "some.toml", tmp_path):
        with refused(ConfigError, path.name):
            Outer.read(path)


SOON = 10  # seconds of CPU time: a busy machine takes 1.5, and the file of dotted keys took 40 before it had a limit
ENDLESS = {
    "an integer of 6,000 digits": f"count = {'9' * 6000}",
    "an integer of 50,000 hexadecimal digits": f"count = 0x{'f' * 50_000}",
    "a dotted key of 50,000 parts": f"{'.'.join(50_000 * 'a')} = 1",
    "dotted keys of 1,000 parts": "\n".join(f"a{number}{'.a' * 1000} = 1" for number in range(30)),
    "dotted keys in tables in a line": f"z = [{','.join(f'{{a{number}{chr(46)}a = 1}}' for number in range(100))}]",
    "dotted tables": "\n".join(f"[a{number}{'.a' * 1000}]" for number in range(30)),
    "50,000 keys": "\n".join(f"a.b{number} = 1" for number in range(50_000)),
    "arrays in arrays": f"count = {'[' * 1000}{']' * 1000}",
    "a few arrays in arrays": f"count = {'[' * 100}{']' * 100}",
    "arrays over many lines": "count = " + "[\n" * 20_000 + "]\n" * 20_000,
    "tables in tables": f"count = {'{a=' * 300}1{'}' * 300}",
    "a long line": f"name = '{'x' * 3000}'",
    "a key of many texts": f"{'.'.join(2_000 * [chr(34) * 2])} = 1",
    "a large file": "# comment\n" * 10_000,
}


@pytest.mark.parametrize("content", ENDLESS.values(), ids=ENDLESS)
def test_a_file_that_would_take_forever_or_too_deep_a_stack_is_refused_soon(tmp_path: Path, content: str) -> None:
    (tmp_path / "some.toml").write_text(content)
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        Outer.read(tmp_path / "some.toml")
    assert time.process_time() - begin < SOON
    assert caught.value.about in ("some.toml", "count", "z")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "override",
    [
        f"{'.'.join(50_000 * 'a')}=1",
        *(f"count={value}" for value in ("9" * 6000, f"0x{'f' * 50_000}", 1000 * "[", 100 * "{a=" + "1" + 100 * "}")),
        f"count={{ {'.'.join(50_000 * 'a')} = 1 }}",
    ],
    ids=["a key", "an integer", "a hexadecimal one", "arrays", "tables", "a key in a table"],
)
def test_an_override_that_would_take_forever_or_too_deep_a_stack_is_refused_soon(override: str) -> None:
    begin = time.process_time()
    with pytest.raises(ConfigError) as caught:
        Outer.parse(overridden({}, [override]), "--set")
    assert time.process_time() - begin < SOON
    assert caught.value.about in ("--set", "count")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_a_device_or_a_pipe_is_no_settings_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.toml"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    with refused(ConfigError, "some.toml"):
        Outer.read(path)


def test_settings_of_the_largest_lists_are_read(tmp_path: Path) -> None:
    names = tuple(f"{number:064d}" for number in range(500))
    table = tomli_w.dumps({"inner": {"names": list(names)}})
    (tmp_path / "some.toml").write_text(table)
    assert Outer.read(tmp_path / "some.toml").inner.names == names


def test_overrides_change_single_values(tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text("count = 7\n")
    changed = Outer.read(tmp_path / "some.toml", ["inner.rate=2.0", 'inner.names=["a", "b"]', "name=no toml"])
    assert changed == Outer(count=7, name="no toml", inner=Inner(rate=2.0, names=("a", "b")))


def test_overriding_leaves_the_table_as_it_was() -> None:
    table = {"inner": {"rate": 1.0}}
    assert overridden(table, ["inner.rate=2.0"]) == {"inner": {"rate": 2.0}}
    assert table == {"inner": {"rate": 1.0}}


@pytest.mark.parametrize("override", ["", "count", "=7", "inner.=7", "count.x=7"])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with refused(ConfigError, "--set"):
        overridden({"count": 3}, [override])


def test_an_override_cannot_add_a_second_key() -> None:
    assert overridden({}, ['name="a"\ncount=5']) == {"name": '"a"\ncount=5'}


# The flag definition of a rollout: one form, and nothing else is read.
CODES = st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=3)
ROLLOUTS = st.builds(
    Rollout,
    release=st.integers(0, 2**63 - 1),
    previous=st.integers(0, 2**63 - 1),
    share=st.integers(0, 100),
    languages=st.lists(CODES, max_size=100, unique=True).map(tuple),
)


@given(ROLLOUTS)
def test_what_is_written_is_read(rollout: Rollout) -> None:
    raw = rollout.encode()
    assert Rollout.decode(raw) == rollout
    assert len(raw) < MAX_FLAGS


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with refused(TrustError, "flags.json"):
        Rollout.decode(raw)


def changed(path: str, value: object) -> bytes:
    """A good definition with one other value."""
    document: Any = json.loads(Rollout(2, 1, 10, ("de",)).encode())
    place = document["flags"]["release-2"]
    *keys, last = path.split(".")
    for key in keys:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("state", "DISABLED"),
        ("variants.newest", -1),
        ("variants.other", 3),
        ("targeting.if.1.fractional.0.1", 101),
        ("targeting.if.2", "newest"),
        ("targeting.if.0.in.1", ["de-AT"]),
        ("targeting.if.0.in.1", ["de"] * 101),
        ("targeting", {"fractional": []}),
        ("targeting", None),
    ],
)
def test_another_definition_is_refused(path: str, value: object) -> None:
    with refused(TrustError, "flags.json"):
        Rollout.decode(changed(path, value))


def test_a_truncated_definition_is_refused() -> None:
    raw = Rollout(2, 1, 10, ("de",)).encode()
    for end in range(len(raw)):
        with refused(TrustError, "flags.json"):
            Rollout.decode(raw[:end])


@pytest.mark.parametrize("code", ["", "d", "DE", "deut", "de-AT", "d3", "de\n"])
def test_what_is_no_language(code: str) -> None:
    with refused(ConfigError, "language"):
        check_language(code)


@pytest.mark.parametrize(
    ("release", "key", "part"),
    [  # of openfeature-flagd-core 2.0
        (2, "d98d70924ee7056ad79057eac5b6b4b4", 41),
        (3, "2cc5122d216268c31bf323d2c820aebb", 74),
        (1000, "046683030c70392f26c7e7737bcaeec8", 43),
        (2, "bb6a7d0aa52ba096a1c18721cd9789c1", 84),
        (3, "fb2c9cbbb6b7cebf504dd39a72efebb8", 37),
        (12, "4fd0471c8977ada99acc4ebb8ebbb94a", 44),
    ],
)
def test_a_device_is_in_the_part_that_flagd_puts_it_into(release: int, key: str, part: int) -> None:
    assert Rollout(release, 1, part).release_for(key, None) == 1
    assert Rollout(release, 1, part + 1).release_for(key, None) == release


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"a", 0x3C2569B2), (b"hello", 0x248BFA47), (b"hello, world", 0x149BBB7F)],  # published by smhasher
)
def test_the_hash_is_murmur3(data: bytes, expected: int) -> None:
    assert murmur3(data) == expected
