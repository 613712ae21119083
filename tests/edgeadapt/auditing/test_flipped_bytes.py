"""A flipped byte in a coordinator's files, or a file less or more: an audit notices it, or the file is on the list.

The list is in docs/reference/audit.md, with a reason for each entry.
"""

import random
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import EdgeAdaptError
from aggregation.pki import Authority, Root
from aggregation.pki.identity import PublicKey
from edgeadapt.auditing import AuditInput, AuditOptions, Check, Status
from edgeadapt.formats.registryfiles import DATABASE, REVOKED
from edgeadapt.formats.registryreader import open_registry_files
from tests.support import FleetOf

SEED, FLIPS = 20261126, 12  # flips in each file of a kind that is read;
SMALL = 1000  # bytes of one in which every byte is flipped
READ = (
    "transcript/session-*.log",
    "transcript/authority.pem",
    "transcript/coordinator.pem",
    "transcript/revoked.crl",
    "transcript/vectors/*.bin",
    "blobs/*.safetensors",
)
UNREAD = ("authority.pem", "coordinator.pem", "federation.toml", "run.json", "run.lock", "signing.pem")
DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "audit.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of a finished run, made when the first test needs it."""
    return tmp_path_factory.mktemp("flipped")


@pytest.fixture
def state_dir(runs: Path, fleet_of: FleetOf, tmp_path: Path) -> Path:
    """A coordinator's state directory after two sessions, with every kind of file that an audit reads."""
    if not (runs / "coordinator").exists():
        fleet = fleet_of(3, rounds=2, aggregation__session_rounds=1, aggregation__keep_masked_inputs=True)
        install(fleet.out)
        fleet.federate(fleet.grid())
        shutil.copytree(fleet.out / "coordinator", runs / "coordinator")
    return Path(shutil.copytree(runs / "coordinator", tmp_path / "coordinator"))


def install(run: Path) -> None:
    """Give the coordinator a revocation list of its authority."""
    authority, now = Authority.from_pem((run / "authority" / "authority.pem").read_bytes()), datetime.now(UTC)
    begin = now.replace(microsecond=0) - timedelta(days=1)
    listed = authority.revocations(1, {}, begin, begin + timedelta(days=30))
    (run / "coordinator" / REVOKED).write_bytes(listed.to_pem())


def passes(state_dir: Path) -> bool:
    """Whether the audit of everything in the folder passes, as the command does it."""
    try:
        checked = AuditInput.open(state_dir, AuditOptions())
        checked.require(checked.audit(unfinished=False), unfinished=False)
    except (EdgeAdaptError, OSError):
        return False
    return True


def files_of(state_dir: Path, *patterns: str) -> list[str]:
    names = sorted(str(path.relative_to(state_dir)) for path in state_dir.rglob("*") if path.is_file())
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def flipped(path: Path, count: int) -> Iterator[int]:
    """Flip one byte after the other, each at a random place, or in a small file each; yields the place while the byte
    is flipped. Other tests flip each byte of a log and of a signed document."""
    sound, generator = path.read_bytes(), random.Random(f"{SEED} {path.suffix}")  # noqa: S311
    count = len(sound) if len(sound) <= SMALL else count
    try:
        for place in generator.sample(range(len(sound)), count):
            damaged = bytearray(sound)
            damaged[place] ^= generator.randrange(1, 256)
            path.write_bytes(damaged)
            yield place
    finally:
        path.write_bytes(sound)


def test_every_file_of_a_coordinator_is_read_or_on_the_list(state_dir: Path) -> None:
    assert passes(state_dir)
    assert files_of(state_dir, "*") == sorted({*files_of(state_dir, *READ), *UNREAD, REVOKED, DATABASE})
    assert all(files_of(state_dir, pattern) for pattern in READ)
    text = DOCUMENT.read_text()
    assert [name for name in UNREAD if f"`{name}`" not in text] == []


def test_a_flipped_byte_in_a_file_that_is_read_is_noticed(state_dir: Path) -> None:
    names = files_of(state_dir, *READ)
    kinds = {pattern: files_of(state_dir, pattern)[0] for pattern in READ} | {name: name for name in names[-1:]}
    for name in kinds.values():
        assert [(name, place) for place in flipped(state_dir / name, FLIPS) if passes(state_dir)] == []
    assert passes(state_dir)


def test_a_flipped_byte_in_the_database_is_noticed_or_changes_nothing_that_is_read(state_dir: Path) -> None:
    """The rest are costs, what a coordinator resumes from, names of columns and free space."""
    path, key = state_dir / DATABASE, PublicKey.from_pem((state_dir / "coordinator.pem").read_bytes())
    registry = open_registry_files(state_dir, [key])

    def read() -> list[Any]:
        return [registry.rounds(), *(registry.manifest(number) for number in (None, 0, 1, 2))]

    sound = read()
    unnoticed = [(place, read() == sound) for place in flipped(path, 40) if passes(state_dir)]
    assert unnoticed  # so the document has to say what these bytes are
    assert all(unread for _, unread in unnoticed)


def test_a_flipped_byte_in_any_signed_manifest_or_record_is_noticed(state_dir: Path) -> None:
    raw = (state_dir / DATABASE).read_bytes()
    starts = [found.start() for found in re.finditer(rb'"payloadType":"application/vnd.edgeadapt.', raw)]
    assert len(starts) >= 5
    for start in starts:
        damaged = bytearray(raw)
        damaged[start - 40] ^= 1
        (state_dir / DATABASE).write_bytes(damaged)
        assert not passes(state_dir)


def test_a_flipped_byte_in_the_list_of_the_state_directory_is_noticed_or_means_the_same(state_dir: Path) -> None:
    """It may be in DER or PEM, as the operator copied it there."""
    root = Root.from_pem((state_dir / "authority.pem").read_bytes())
    path = state_dir / REVOKED
    sound = root.revocations(path.read_bytes())
    assert [at for at in flipped(path, 40) if passes(state_dir) and root.revocations(path.read_bytes()) != sound] == []


@pytest.mark.parametrize("name", UNREAD)
def test_a_file_on_the_list_changes_nothing(state_dir: Path, name: str) -> None:
    (state_dir / name).write_bytes(b"anything")
    assert passes(state_dir)


def test_a_file_that_is_gone_is_noticed_or_on_the_list(state_dir: Path) -> None:
    unnoticed = []
    for name in files_of(state_dir, "*"):
        raw = (state_dir / name).read_bytes()
        (state_dir / name).unlink()
        unnoticed += [name] if passes(state_dir) else []
        (state_dir / name).write_bytes(raw)
    assert unnoticed == sorted({*UNREAD, REVOKED, f"transcript/{REVOKED}", DATABASE})


def test_a_file_under_a_name_that_no_log_and_no_manifest_has_changes_nothing(state_dir: Path) -> None:
    for name in files_of(state_dir, *READ):
        shutil.copy(state_dir / name, (state_dir / name).with_name(f"copy-{Path(name).name}"))
    assert passes(state_dir)
    unread = AuditInput.open(state_dir, AuditOptions()).unread
    assert {name.removeprefix("copy-") for name in unread} == {
        Path(name).name for name in files_of(state_dir, *READ) if Path(name).parent.name == "transcript"
    } - set(unread)


def test_without_the_registry_the_adapters_are_skipped(state_dir: Path) -> None:
    (state_dir / DATABASE).unlink()
    reports = AuditInput.open(state_dir, AuditOptions()).audit(unfinished=False)
    findings = [finding for report in reports.values() for finding in report.findings]
    assert {finding.check for finding in findings if finding.status is Status.SKIPPED} == {Check.ADAPTERS}
