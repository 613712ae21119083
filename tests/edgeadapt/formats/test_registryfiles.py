"""A registry read from its files alone: the values that the coordinator published, or an error that names the file."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from coordinator.statedir import open_registry
from edgeadapt.formats import files, registryfiles
from edgeadapt.formats.registryfiles import BLOBS, DATABASE, SCHEMA, RegistryFiles, blob_name, float32_tensors
from edgeadapt.formats.registryreader import open_registry_files
from tests.support import refused
from tests.support.registry import Rounds, commit

LAST = 2


tensors, manifest = Rounds.tensors, Rounds.manifest


@pytest.fixture
def state_dir(tmp_path: Path, key: IdentityKey) -> Path:
    """A coordinator's state directory, with versions 0 to ``LAST`` published by the coordinator's own code."""
    with closing(open_registry(tmp_path, key)) as registry:
        for version in range(LAST + 1):
            commit(registry, manifest(version), files.encode(tensors(version)), key)
    return tmp_path


@pytest.fixture
def registry(state_dir: Path, key: IdentityKey) -> RegistryFiles:
    return open_registry_files(state_dir, [key.public])


@contextmanager
def database(state_dir: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(state_dir / DATABASE)) as connection, connection:
        yield connection


def test_every_version_is_read_as_the_coordinator_published_it(registry: RegistryFiles) -> None:
    for version in range(LAST + 1):
        found = registry.manifest(version)
        assert found == manifest(version)
        assert registry.blob(found) == files.encode(tensors(version))
        read = registry.tensors(found)
        assert {name: value.tolist() for name, value in read.items()} == {
            name: value.tolist() for name, value in tensors(version).items()
        }
    assert registry.manifest() == manifest(LAST)
    assert registry.manifest(LAST + 1) is registry.manifest(-1) is None


def test_the_records_of_rounds_are_read_as_the_coordinator_stored_them(
    registry: RegistryFiles, state_dir: Path, key: IdentityKey
) -> None:
    with closing(open_registry(state_dir, key)) as stored:
        assert registry.rounds() == stored.rounds()
    assert [record.version for record in registry.rounds()] == list(range(1, LAST + 1))


@pytest.mark.parametrize(
    "damage", ["DELETE FROM edgeadapt_rounds WHERE round = 1", "UPDATE edgeadapt_rounds SET record = 'x'"]
)
def test_a_record_that_is_missing_or_altered_is_refused(registry: RegistryFiles, state_dir: Path, damage: str) -> None:
    with database(state_dir) as connection:
        connection.execute(damage)
    with refused(TrustError, "record"):
        registry.rounds()


def test_reading_changes_no_file_and_needs_no_right_to_write(state_dir: Path, registry: RegistryFiles) -> None:
    before = {path: path.read_bytes() for path in state_dir.rglob("*") if path.is_file()}
    for path in before:
        path.chmod(0o400)
    registry.tensors(manifest(LAST))
    registry.manifest()
    assert {path: path.read_bytes() for path in state_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("part", [DATABASE, BLOBS])
def test_a_folder_that_lacks_a_part_is_not_a_state_directory(state_dir: Path, key: IdentityKey, part: str) -> None:
    (state_dir / part).rename(state_dir / "elsewhere")
    with refused(ConfigError, part, value=str(state_dir)):
        open_registry_files(state_dir, [key.public])


def test_a_registry_without_a_version_has_no_newest(tmp_path: Path, key: IdentityKey) -> None:
    open_registry(tmp_path, key).close()
    assert open_registry_files(tmp_path, [key.public]).manifest() is None


@pytest.mark.parametrize("content", [b"", b"no database"])
def test_a_file_that_is_not_a_registry_is_named(state_dir: Path, registry: RegistryFiles, content: bytes) -> None:
    (state_dir / DATABASE).write_bytes(content)
    for version in (1, None):
        with refused(DataError, DATABASE) as caught:
            registry.manifest(version)
        assert str(caught.value).startswith(f"{state_dir / DATABASE} is not a registry or is damaged")


KILLED = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN")
database.execute("INSERT INTO edgeadapt_versions VALUES (9, 'x', randomblob(4000000))")
os._exit(9)
"""
ENDLESS = "WITH RECURSIVE n(round) AS (SELECT 1 UNION ALL SELECT round + 1 FROM n) SELECT round, x'' AS record FROM n"


@pytest.mark.parametrize("where", ["", " WHERE round < 0"], ids=["rows", "no rows"])
def test_a_view_without_an_end_is_no_table(
    state_dir: Path, registry: RegistryFiles, key: IdentityKey, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise whoever reads the registry, also the coordinator, never ends."""
    with database(state_dir) as connection:
        connection.execute("DROP TABLE edgeadapt_rounds")
        connection.execute(f"CREATE VIEW edgeadapt_rounds AS {ENDLESS}{where}")
    with refused(DataError, DATABASE) as caught:
        registry.rounds()
    assert "'edgeadapt_rounds' is not a table" in str(caught.value)
    with refused(DataError, "database"):
        open_registry(state_dir, key)
    monkeypatch.setattr(registryfiles, "NOT_TABLES", "SELECT 1 WHERE 0")
    with refused(DataError, DATABASE) as caught:  # it ends also then
        registry.rounds()
    assert "interrupted" in str(caught.value)


def test_a_commit_that_a_kill_interrupted_is_no_damage(
    state_dir: Path, registry: RegistryFiles, key: IdentityKey
) -> None:
    subprocess.run([sys.executable, "-c", KILLED, state_dir / DATABASE], check=False)
    with refused(DataError, f"{DATABASE}-journal") as caught:
        registry.manifest()
    assert f"edgeadapt coordinator status {state_dir}" in str(caught.value)
    open_registry(state_dir, key).close()  # as that command does
    assert registry.manifest() == manifest(LAST)


def test_a_database_of_another_schema_is_refused(state_dir: Path, registry: RegistryFiles) -> None:
    with database(state_dir) as connection:
        connection.execute("UPDATE edgeadapt_schema SET version_num = '99'")
    with refused(ConfigError, "database.schema", value="99"):
        registry.manifest()
    with database(state_dir) as connection:
        connection.execute("DELETE FROM edgeadapt_schema")
    with refused(ConfigError, "database.schema", value=None):
        registry.manifest()


def test_a_flipped_bit_anywhere_in_the_database_is_refused_in_one_line_or_changes_nothing(
    tmp_path: Path, key: IdentityKey
) -> None:
    (tmp_path / BLOBS).mkdir()
    path, signed = tmp_path / DATABASE, manifest(1).sign(key)
    with database(tmp_path) as connection:  # as few tables as are read, so that every byte can be tried
        connection.execute("CREATE TABLE edgeadapt_schema (version_num TEXT PRIMARY KEY)")
        connection.execute("CREATE TABLE edgeadapt_versions (version INTEGER, sha256 TEXT, manifest BLOB)")
        connection.execute("INSERT INTO edgeadapt_schema VALUES ('2')")
        connection.execute("INSERT INTO edgeadapt_versions VALUES (1, ?, ?)", (manifest(1).sha256, signed))
    sound, registry, lines = path.read_bytes(), open_registry_files(tmp_path, [key.public]), []
    start = sound.index(signed)
    inside = range(start + 20, start + len(signed))  # one byte of the manifest is like another
    for at in [at for at, byte in enumerate(sound) if byte and at not in inside]:
        path.write_bytes(sound[:at] + bytes([sound[at] ^ (1, 4, 128)[at % 3]]) + sound[at + 1 :])
        for version in (1, None):
            try:
                assert registry.manifest(version) in (None, manifest(1))
            except (ConfigError, DataError, TrustError) as error:
                lines.append(str(error))
    assert len(lines) > 100
    assert not [line for line in lines if "\n" in line]


@pytest.mark.parametrize("value", [7, "text", 1.5, None, b"", b"{}"], ids=repr)
def test_what_is_not_a_manifest_is_refused(state_dir: Path, key: IdentityKey, value: object) -> None:
    with database(state_dir) as connection:
        connection.execute("CREATE TABLE loose (version INTEGER, sha256 TEXT, manifest)")  # without NOT NULL
        connection.execute("INSERT INTO loose VALUES (1, ?, ?)", (manifest(1).sha256, value))
        connection.execute("DROP TABLE edgeadapt_rounds")
        connection.execute("DROP TABLE edgeadapt_versions")
        connection.execute("ALTER TABLE loose RENAME TO edgeadapt_versions")
    with refused(TrustError, "manifest", value=1) as caught:
        open_registry_files(state_dir, [key.public]).manifest(1)
    assert str(caught.value).startswith(f"{state_dir / DATABASE}, manifest of version 1: ")


def test_a_manifest_larger_than_any_signed_document_is_not_read(state_dir: Path, registry: RegistryFiles) -> None:
    with database(state_dir) as connection:
        connection.execute("UPDATE edgeadapt_versions SET manifest = zeroblob(300000000) WHERE version = 1")
    with refused(DataError, DATABASE):
        registry.manifest(1)
    assert registry.manifest(2) == manifest(2)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw, key: raw[:-1] + b" ",
        lambda raw, key: manifest(2).sign(key),
        lambda raw, key: replace(manifest(1), sha256="c" * 64).sign(key),
    ],
    ids=["altered", "of another version", "of another file"],
)
def test_a_manifest_that_was_exchanged_is_refused(
    state_dir: Path, registry: RegistryFiles, key: IdentityKey, change: Callable[[bytes, IdentityKey], bytes]
) -> None:
    with database(state_dir) as connection:
        raw = change(manifest(1).sign(key), key)
        connection.execute("UPDATE edgeadapt_versions SET manifest = ? WHERE version = 1", (raw,))
    with refused(TrustError, "manifest", value=1):
        registry.manifest(1)


def test_two_signed_manifests_of_one_version_are_refused(tmp_path: Path, key: IdentityKey) -> None:
    """Who reads which of them is up to the database; the coordinator's own tables do not allow it."""
    (tmp_path / BLOBS).mkdir()
    others = [manifest(1), replace(manifest(1), labels=("off", "on"))]
    with database(tmp_path) as connection:
        connection.execute("CREATE TABLE edgeadapt_schema (version_num TEXT PRIMARY KEY)")
        connection.execute("CREATE TABLE edgeadapt_versions (version INTEGER, sha256 TEXT, manifest BLOB)")
        connection.execute("INSERT INTO edgeadapt_schema VALUES (?)", (SCHEMA,))
        rows = [(each.version, each.sha256, each.sign(key)) for each in others]
        connection.executemany("INSERT INTO edgeadapt_versions VALUES (?, ?, ?)", rows)
    with refused(TrustError, "manifest", value=1):
        open_registry_files(tmp_path, [key.public]).manifest(1)


def test_a_manifest_of_another_signer_is_refused(state_dir: Path, stranger: IdentityKey) -> None:
    with refused(TrustError, "manifest", value=LAST):
        open_registry_files(state_dir, [stranger.public]).manifest()


@pytest.mark.parametrize("change", [lambda raw: raw[:-1] + b"\x01", lambda raw: raw[:-1], lambda raw: raw + b"\0"])
def test_an_altered_file_is_refused(state_dir: Path, registry: RegistryFiles, change: Callable[[bytes], bytes]) -> None:
    path = state_dir / BLOBS / blob_name(manifest(1).sha256)
    path.write_bytes(change(path.read_bytes()))
    with refused(TrustError, "blob", value=manifest(1).sha256) as caught:
        registry.tensors(manifest(1))
    assert str(caught.value) == f"{path} was altered: restore it from a copy"


def test_a_file_larger_than_was_signed_is_not_read(state_dir: Path, registry: RegistryFiles) -> None:
    os.truncate(state_dir / BLOBS / blob_name(manifest(1).sha256), 2**38)  # a hole: it takes no space
    with refused(TrustError, "blob"):
        registry.blob(manifest(1))


def test_a_missing_file_is_named(state_dir: Path, registry: RegistryFiles) -> None:
    (state_dir / BLOBS / blob_name(manifest(1).sha256)).unlink()
    with refused(DataError, "blob", value=manifest(1).sha256):
        registry.blob(manifest(1))


def test_a_file_of_another_layout_than_its_manifest_is_refused(registry: RegistryFiles) -> None:
    with refused(TrustError, "layout_digest"):
        registry.tensors(replace(manifest(1), layout_digest="c" * 64))


@pytest.mark.parametrize("blob", [b"nothing", files.encode({"a": np.ones(1, np.float32)}).replace(b"F32", b"I32")])
def test_a_published_file_that_is_not_an_adapter_is_named(
    state_dir: Path, registry: RegistryFiles, blob: bytes
) -> None:
    digest = files.sha256(blob)
    (state_dir / BLOBS / blob_name(digest)).write_bytes(blob)
    with refused(DataError, "blob", value=digest) as caught:
        registry.tensors(replace(manifest(1), sha256=digest, size=len(blob)))
    assert blob_name(digest) in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(state_dir: Path, registry: RegistryFiles) -> None:
    blob = files.encode({"a": np.ones(1, np.float32)}).replace(struct.pack("<f", 1), struct.pack("<f", np.nan))
    digest = files.sha256(blob)
    (state_dir / BLOBS / blob_name(digest)).write_bytes(blob)
    with refused(DataError, "blob"):
        registry.tensors(replace(manifest(1), sha256=digest, size=len(blob)))


# The safetensors form, read without the library


@given(shapes=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_file_is_read_as_safetensors_reads_it(shapes: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    blob = files.encode({f"t.{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)})
    expected, found = files.decode(blob), float32_tensors(blob)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == np.float32
        assert (found[name].shape, found[name].tobytes()) == (tensor.shape, tensor.tobytes())


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(raw: bytes) -> None:
    with refused(DataError, "blob"):
        float32_tensors(raw)


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
def test_a_header_that_contradicts_its_tensors_is_refused(entry: Any) -> None:
    header = json.dumps({"t": entry}).encode()
    with refused(DataError, "blob"):
        float32_tensors(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_brackets_without_end_are_refused(opening: bytes) -> None:
    deep = 100_000 * opening
    with refused(DataError, "blob"):
        float32_tensors(len(deep).to_bytes(8, "little") + deep)
