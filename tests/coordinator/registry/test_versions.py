"""The registry returns what was published, verified; it refuses contradictions and detects alterations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select, text
from sqlalchemy.engine import URL

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from coordinator.registry import Registry, database
from edgeadapt.formats import files
from edgeadapt.formats.manifest import VersionManifest, digest_of
from tests.support import refused
from tests.support.registry import Rounds, commit

Reopen = Callable[[], Registry]


def execute(registry: Registry, statement: str, **values: object) -> None:
    with registry.engine.begin() as connection:
        connection.execute(text(statement), values)


def test_a_new_registry_is_empty(registry: Registry) -> None:
    assert registry.latest() is None
    assert registry.versions() == ()
    assert registry.rounds() == ()
    for read in (registry.head, registry.optimizer_state, registry.newest_adapter):
        with refused(EdgeAdaptError, "registry"):
            read()


def test_a_new_process_reads_the_seed_and_the_rounds_as_they_were_stored(reopen: Reopen, rounds: Any) -> None:
    registry = reopen()
    rounds.seed(registry)
    for number in (1, 2, 3):
        rounds.commit(registry, number)
    again = reopen()
    latest = again.latest()
    assert latest is not None
    assert latest.manifest == rounds.manifest(3)
    assert [version.manifest for version in again.versions()] == [rounds.manifest(n) for n in range(4)]
    assert again.version(1).manifest == rounds.manifest(1)
    assert again.rounds() == tuple(rounds.record(n) for n in (1, 2, 3))
    assert again.blob(2) == rounds.blob(2)
    assert (again.tensors(2)["a"] == 2).all()
    assert (again.optimizer_state()["first"] == 3).all()
    assert rounds.snapshot(again) == rounds.snapshot(registry)


def test_folders_with_odd_names_work_and_missing_ones_are_created(tmp_path: Path, rounds: Any) -> None:
    folder = tmp_path / "a b?c#d%20@ü"
    url = URL.create("sqlite", database=str(folder / "deep" / "registry.db"))
    registry = Registry.open(url, str(folder / "blobs"), [rounds.key.public])
    rounds.seed(registry)
    assert registry.blob(0) == rounds.blob(0)
    assert (folder / "deep" / "registry.db").is_file()
    assert [path.name for path in (folder / "blobs").iterdir()] == [f"{rounds.manifest(0).sha256}.safetensors"]
    registry.close()


def test_an_aborted_round_leaves_adapter_and_optimizer_as_they_were(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    rounds.commit(registry, 1)
    second = rounds.aborted(2)
    third = replace(rounds.aborted(3), previous=digest_of(second.sign(rounds.key)), optimizer=second.optimizer)
    for record in (second, third):
        registry.record_round(record, rounds.key)
    latest = registry.latest()
    assert latest is not None
    assert latest.manifest.version == 1
    assert (registry.optimizer_state()["first"] == 1).all()
    assert registry.rounds() == (rounds.record(1), second, third)


def test_an_optimizer_without_state_stores_none(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    rounds.commit(registry, 1)
    record = replace(rounds.record(2), optimizer=None)
    registry.commit_round(record, rounds.manifest(2), rounds.blob(2), {}, rounds.key)
    assert registry.optimizer_state() == {}


def test_only_version_0_is_published_without_a_round(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    before = rounds.snapshot(registry)
    with refused(DataError, "manifest.version", value=1):
        registry.publish(rounds.manifest(1), rounds.blob(1), rounds.key)
    with refused(DataError, "manifest.version", value=0):
        registry.publish(rounds.manifest(0), rounds.blob(0), rounds.key)
    assert rounds.snapshot(registry) == before


def on_another_base(rounds: Any, number: int, **changes: Any) -> VersionManifest:
    """The manifest of version ``number``, after as many rounds but one, as the first on another base."""
    unmade: dict[str, Any] = {"plan": None, "rule": None, "survivors": (), "metrics": {}, "round": number - 1}
    return replace(rounds.manifest(number), **(unmade | {"base_digest": "c" * 64} | changes))  # type: ignore[no-any-return]


def test_the_first_version_on_another_base_is_of_no_round_and_the_next_one_follows_it(
    registry: Registry, rounds: Any
) -> None:
    rounds.seed(registry)
    rounds.commit(registry, 1)
    registry.publish(on_another_base(rounds, 2), rounds.blob(2), rounds.key)
    head = registry.head()
    assert (head.newest, head.earlier) == (rounds.manifest(2).id, (rounds.manifest(1).id,))
    assert head.round is not None
    assert head.round.round == 1
    record = replace(rounds.record(2), version=3, adapter=rounds.manifest(3).sha256, optimizer=None)
    made = replace(rounds.manifest(3), round=2, plan=record.plan, base_digest="c" * 64)
    registry.commit_round(record, made, rounds.blob(3), {}, rounds.key)
    assert (registry.head().newest, registry.head().earlier) == (made.id, ())


@pytest.mark.parametrize(
    "change",
    [
        {"base_digest": "b" * 64},
        {"labels": ("on", "off", "more")},
        {"parent": None},
        {"metrics": {"loss": 1.0}},
        {"plan": "a" * 64},
        {"round": 0},
        {"survivors": ("anna",)},
        {"version": 3},
    ],
)
def test_what_is_not_the_first_version_on_another_base_is_not_published_without_a_round(
    registry: Registry, rounds: Any, change: dict[str, Any]
) -> None:
    rounds.seed(registry)
    rounds.commit(registry, 1)
    with refused(DataError, "manifest.version"):
        registry.publish(on_another_base(rounds, 2, **change), rounds.blob(2), rounds.key)


def test_a_version_that_is_not_the_next_one_is_refused(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    record = replace(rounds.record(2), round=1, previous=None)
    manifest = replace(rounds.manifest(2), round=1)
    with refused(DataError, "manifest.version", value=2):
        registry.commit_round(record, manifest, rounds.blob(2), rounds.state(2), rounds.key)


@pytest.mark.parametrize("parent", [None, "f" * 64, files.sha256(files.encode(Rounds.tensors(0)))])
def test_a_version_that_is_not_made_from_the_last_one_is_refused(
    registry: Registry, rounds: Any, parent: str | None
) -> None:
    rounds.seed(registry)
    rounds.commit(registry, 1)
    manifest = replace(rounds.manifest(2), parent=parent)
    with refused(DataError, "manifest.parent"):
        registry.commit_round(rounds.record(2), manifest, rounds.blob(2), rounds.state(2), rounds.key)


def test_a_file_that_the_manifest_does_not_describe_is_refused(registry: Registry, rounds: Any) -> None:
    with refused(DataError, "manifest.sha256"):
        registry.publish(rounds.manifest(0), rounds.blob(1), rounds.key)
    with refused(DataError, "manifest.sha256"):
        registry.publish(replace(rounds.manifest(0), size=1), rounds.blob(0), rounds.key)
    with refused(DataError, "manifest.layout_digest"):
        registry.publish(replace(rounds.manifest(0), layout_digest="0" * 64), rounds.blob(0), rounds.key)
    junk = b"no adapter"
    manifest = replace(rounds.manifest(0), sha256=files.sha256(junk), size=len(junk))
    with pytest.raises(DataError):
        registry.publish(manifest, junk, rounds.key)
    assert registry.latest() is None


def test_a_key_that_the_registry_does_not_trust_cannot_publish(registry: Registry, rounds: Any) -> None:
    stranger = IdentityKey.generate(SystemEntropy())
    with refused(ConfigError, "key"):
        registry.publish(rounds.manifest(0), rounds.blob(0), stranger)
    assert registry.latest() is None


def test_a_round_is_recorded_once(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    rounds.commit(registry, 1)
    before = rounds.snapshot(registry)
    for record in (rounds.aborted(1), replace(rounds.aborted(2), previous=None), rounds.aborted(3)):
        with refused(DataError, "record.previous", value=record.round):
            registry.record_round(replace(record, optimizer=rounds.record(1).optimizer), rounds.key)
    with refused(DataError, "record.optimizer"):
        registry.record_round(replace(rounds.aborted(2), optimizer=None), rounds.key)
    with refused(DataError, "record.optimizer"):
        registry.commit_round(rounds.record(2), rounds.manifest(2), rounds.blob(2), {}, rounds.key)
    assert rounds.snapshot(registry) == before


def test_a_record_and_a_manifest_that_contradict_each_other_are_refused(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    before = rounds.snapshot(registry)
    good, blob = rounds.manifest(1), rounds.blob(1)
    for record, manifest, file in [
        (rounds.record(2), good, blob),
        (rounds.aborted(1), good, blob),
        (replace(rounds.record(1), plan="f" * 64), good, blob),
        (replace(rounds.record(1), adapter="f" * 64), good, blob),
        (replace(rounds.record(1), survivors=("anna",)), good, blob),
    ]:
        with refused(DataError, "record"):
            registry.commit_round(record, manifest, file, rounds.state(1), rounds.key)
    with refused(DataError, "record.version", value=1):
        registry.record_round(rounds.record(1), rounds.key)
    assert rounds.snapshot(registry) == before


def test_a_record_with_a_number_that_is_not_finite_cannot_be_made(rounds: Any) -> None:
    for about, change in {"loss": {"metrics": {"loss": float("nan")}}, "seconds": {"seconds": float("inf")}}.items():
        with refused(DataError, about):
            replace(rounds.record(1), **change)


@pytest.mark.parametrize(
    "change", [{"aborted": "too few"}, {"version": None}, {"adapter": None}, {"sum": None}, {"plan": None}]
)
def test_a_record_is_of_an_abort_or_of_a_result(rounds: Any, change: dict[str, Any]) -> None:
    with refused(DataError, "version"):
        replace(rounds.record(1), **change)
    with refused(DataError, "version"):
        replace(rounds.aborted(1), reason=None)


def test_an_optimizer_state_that_is_not_finite_stops_the_commit(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    before = rounds.snapshot(registry)
    state = {"first": np.array([np.nan], np.float32)}
    with pytest.raises(DataError):
        registry.commit_round(rounds.record(1), rounds.manifest(1), rounds.blob(1), state, rounds.key)
    assert rounds.snapshot(registry) == before


def test_publishing_the_same_bytes_repairs_a_damaged_blob(registry: Registry, rounds: Any, tmp_path: Path) -> None:
    rounds.seed(registry)
    (tmp_path / "blobs" / f"{rounds.manifest(0).sha256}.safetensors").write_bytes(b"damaged")
    same = replace(rounds.manifest(0), version=1, parent=rounds.manifest(0).sha256)
    commit(registry, same, rounds.blob(0), rounds.key)
    assert registry.blob(0) == rounds.blob(0)


def test_a_manifest_by_an_untrusted_key_is_detected_on_reading(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    forged = rounds.manifest(0).sign(IdentityKey.generate(SystemEntropy()))
    execute(registry, "UPDATE edgeadapt_versions SET manifest = :raw", raw=forged)
    with pytest.raises(TrustError, match="version 0 of sqlite"):  # which of all signed files it is
        registry.latest()


def test_a_genuine_manifest_under_another_number_is_detected_on_reading(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    rounds.commit(registry, 1)
    old = registry.version(0).raw
    execute(registry, "UPDATE edgeadapt_versions SET manifest = :raw WHERE version = 1", raw=old)
    with refused(TrustError, "manifest"):
        registry.latest()


def test_an_altered_or_missing_optimizer_state_is_detected_on_reading(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    rounds.commit(registry, 1)
    other = files.encode({"first": np.zeros(5, np.float32)})
    for damage in (
        "UPDATE edgeadapt_optimizer SET tensors = :raw",
        "DELETE FROM edgeadapt_optimizer WHERE :raw = :raw",
    ):
        execute(registry, damage, raw=other)
        with refused(TrustError, "optimizer"):
            registry.optimizer_state()


def test_a_record_that_was_removed_moved_or_exchanged_is_detected_on_reading(registry: Registry, rounds: Any) -> None:
    rounds.seed(registry)
    for number in (1, 2, 3):
        rounds.commit(registry, number)
    stranger = IdentityKey.generate(SystemEntropy())
    for damage, values in {
        "DELETE FROM edgeadapt_rounds WHERE round = 1": {},
        "DELETE FROM edgeadapt_rounds WHERE round = 2": {},
        "UPDATE edgeadapt_rounds SET round = 9 WHERE round = 3": {},
        "UPDATE edgeadapt_rounds SET record = :raw WHERE round = 2": {"raw": rounds.record(1).sign(rounds.key)},
        "UPDATE edgeadapt_rounds SET record = :raw WHERE round = 3": {"raw": rounds.record(3).sign(stranger)},
        "UPDATE edgeadapt_rounds SET record = 'text' WHERE round = 3": {},
    }.items():
        with registry.engine.connect() as connection:
            before = connection.execute(select(database.rounds)).all()
        execute(registry, damage, **values)
        with refused(TrustError, "record"):
            registry.rounds()
        with registry.engine.begin() as connection:
            connection.execute(database.rounds.delete())
            connection.execute(database.rounds.insert(), [row._asdict() for row in before])


@pytest.mark.parametrize(
    ("column", "about"),
    [("versions.manifest", "manifest"), ("rounds.record", "record"), ("optimizer.tensors", "optimizer")],
)
def test_text_in_the_place_of_bytes_is_detected_on_reading(
    registry: Registry, rounds: Any, column: str, about: str
) -> None:
    rounds.seed(registry)
    for number in (1, 2):
        rounds.commit(registry, number)
    table, _, name = column.partition(".")
    execute(registry, f"UPDATE edgeadapt_{table} SET {name} = CAST({name} AS TEXT)")  # noqa: S608
    with refused(TrustError, about):
        registry.optimizer_state()


@pytest.mark.parametrize("table", ["versions", "rounds"])
def test_the_last_round_is_not_removed_from_one_table_alone(registry: Registry, rounds: Any, table: str) -> None:
    rounds.seed(registry)
    for number in (1, 2):
        rounds.commit(registry, number)
    column = {"versions": "version", "rounds": "round"}[table]
    execute(registry, f"DELETE FROM edgeadapt_{table} WHERE {column} = 2")  # noqa: S608
    with refused(TrustError, "record", value=1 if table == "versions" else 2):
        registry.head()
