"""The published files as an auditor reads them, without the packages of a coordinator: the same values, or an error."""

import json
import sqlite3
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import files
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from coordinator.audit.published import PARTS, Published, rule_of, tensors_of
from coordinator.optimizer import FedAdam, FedAvg
from coordinator.registry import database
from coordinator.settings import Server
from coordinator.statedir import BLOBS, DATABASE, SETTINGS


@given(shapes=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_file_is_read_as_safetensors_reads_it(shapes: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    blob = files.encode({f"t.{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)})
    expected, found = files.decode(blob), tensors_of(blob)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == np.float32
        assert (found[name].shape, found[name].tobytes()) == (tensor.shape, tensor.tobytes())


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_adapter(raw: bytes) -> None:
    with pytest.raises(DataError, match="is no adapter"):
        tensors_of(raw)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        [1],
    ],
)
def test_a_header_that_lies_about_its_tensors_is_refused(entry: Any) -> None:
    header = json.dumps({"t": entry}).encode()
    with pytest.raises(DataError, match="is no adapter"):
        tensors_of(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_brackets_without_end_are_refused_in_one_line(opening: bytes) -> None:
    deep = 100_000 * opening
    with pytest.raises(DataError, match="is no adapter"):
        tensors_of(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ConfigError, match="names no rule"):
        rule_of(deep)


@pytest.mark.parametrize(
    "server",
    [
        {},
        {"learning_rate": 0.5},
        {"optimizer": "fedadam"},
        {"optimizer": "fedadam", "learning_rate": 0.1, "beta1": 0.5, "beta2": 0.6, "tau": 0.01},
    ],
)
def test_a_rule_is_read_as_the_coordinator_reads_it(server: dict[str, Any]) -> None:
    assert rule_of(json.dumps({"rounds": 3, "server": server}).encode()) == Server(**server).rule()
    assert isinstance(rule_of(b"{}"), FedAvg)
    assert isinstance(rule_of(b'{"server": {"optimizer": "fedadam"}}'), FedAdam)


@pytest.mark.parametrize(
    "settings",
    [
        b"",
        b"[]",
        b"{",
        b'{"server": {"optimizer": "x"}}',
        b'{"server": {"learning_rate": "x"}}',
        b'{"server": {"learning_rate": 1' + bytes([48]) * 400 + b"}}",
    ],
)
def test_settings_without_a_rule_are_refused(settings: bytes) -> None:
    with pytest.raises(ConfigError, match="names no rule"):
        rule_of(settings)


def test_the_names_are_those_of_a_coordinators_home_and_its_database() -> None:
    assert PARTS == (DATABASE, BLOBS, SETTINGS)
    assert str(database.versions) == "edgeadapt_versions"


@pytest.fixture
def key() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "registry.db").write_bytes(b"")
    (tmp_path / "federation.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_that_lacks_a_part_is_no_home(state_dir: Path, key: IdentityKey, part: str) -> None:
    assert Published.lies_in(state_dir)
    (state_dir / part).rename(state_dir / "elsewhere")
    assert Published.lies_in(state_dir) is (part != DATABASE)  # without the others it is a home that is damaged
    with pytest.raises(DataError, match=f"it has no {part}"):
        Published.open(state_dir, key.public)


@pytest.mark.parametrize("content", [b"", b"no database"])
def test_a_database_that_cannot_be_read_is_said_to_be_one(state_dir: Path, key: IdentityKey, content: bytes) -> None:
    (state_dir / "registry.db").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        Published.open(state_dir, key.public).manifest(1)
    with pytest.raises(DataError, match="cannot be read"):
        assert Published.open(state_dir, key.public).newest


def test_a_flipped_bit_anywhere_in_the_registry_is_no_error_of_another_kind(state_dir: Path, key: IdentityKey) -> None:
    path = state_dir / "registry.db"
    path.unlink()
    with closing(sqlite3.connect(path)) as made, made:
        made.execute("create table edgeadapt_versions (version integer, manifest blob)")
        made.execute("insert into edgeadapt_versions values (1, ?)", (b"{}",))
    sound, published, refused = path.read_bytes(), Published.open(state_dir, key.public), 0
    for at in [at for at, byte in enumerate(sound) if byte]:
        for bit in (1, 4, 128):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :])
            for look in (lambda: published.manifest(1), lambda: published.newest):
                try:
                    look()
                except (DataError, TrustError) as error:
                    refused += "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize("settings", ["{", '{"server": {"learning_rate": NaN}}'])
def test_settings_that_cannot_be_used_are_named_with_their_file(
    state_dir: Path, key: IdentityKey, settings: str
) -> None:
    (state_dir / "federation.json").write_text(settings)
    with pytest.raises(ConfigError, match=f"^{state_dir / 'federation.json'}: "):
        Published.open(state_dir, key.public)


def test_a_registry_without_an_adapter_is_said_to_be_one(state_dir: Path, key: IdentityKey) -> None:
    with closing(sqlite3.connect(state_dir / "registry.db")) as made:
        made.execute("create table edgeadapt_versions (version integer, manifest blob)")
    with pytest.raises(DataError, match="holds no adapter"):
        assert Published.open(state_dir, key.public).newest


@pytest.mark.parametrize("value", [7, "text", 1.5, None])
def test_what_is_no_manifest_is_refused(state_dir: Path, key: IdentityKey, value: object) -> None:
    with closing(sqlite3.connect(state_dir / "registry.db")) as made, made:
        made.execute("create table edgeadapt_versions (version integer, manifest blob)")
        made.execute("insert into edgeadapt_versions values (1, ?)", (value,))
    with pytest.raises(TrustError, match=r"registry.db, manifest of adapter 1: "):
        Published.open(state_dir, key.public).manifest(1)


def test_a_file_that_is_missing_or_altered_is_said_to_be(state_dir: Path, key: IdentityKey) -> None:
    published, blob = Published.open(state_dir, key.public), files.encode({"t": np.ones(3, np.float32)})
    digest = files.sha256(blob)
    with pytest.raises(DataError, match=f"adapter 7 .{digest[:12]}. is missing"):
        published.adapter(7, digest)
    (state_dir / "blobs" / f"{digest}.safetensors").write_bytes(blob)
    assert published.adapter(7, digest)["t"].tolist() == [1, 1, 1]
    (state_dir / "blobs" / f"{digest}.safetensors").write_bytes(blob[:-1] + b"\x00")
    with pytest.raises(TrustError, match="was altered"):
        published.adapter(7, digest)
