"""One flipped byte anywhere in a registry: reading notices it, or returns what was stored.

What may change without notice is what no reader uses: SQLite's own format, its free space and its index of keys, and
the key id in an envelope, which only names the key that an error message is about. The audit's half of this is
tests/edgeadapt/auditing/test_flipped_bytes.py.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import EdgeAdaptError
from coordinator.registry import Registry
from edgeadapt.formats import files

SEED, FLIPS, ROUNDS = 20261126, 250, 3


@pytest.fixture
def folder(tmp_path: Path, reopen: Callable[[], Registry], rounds: Any) -> Path:
    """The registry of a few rounds, of which the last one was aborted; closed."""
    registry = reopen()
    rounds.seed(registry)
    for number in range(1, ROUNDS):
        rounds.commit(registry, number)
    registry.record_round(rounds.aborted(ROUNDS), rounds.key)
    registry.close()
    return tmp_path


def read(folder: Path, rounds: Any) -> tuple[Any, ...]:
    """Everything that a coordinator relies on."""
    registry = Registry.open(f"sqlite:///{folder}/registry.db", str(folder / "blobs"), [rounds.key.public])
    try:
        head, state = registry.head(), registry.optimizer_state()
        versions = [version.manifest for version in registry.versions()]
        blobs = [registry.blob(manifest.version) for manifest in versions]
        return head.newest, head.round, files.encode(state), versions, blobs, registry.rounds()
    finally:
        registry.close()


def noticed(folder: Path, rounds: Any, sound: tuple[Any, ...]) -> bool:
    """Whether reading raises; if it does not, it must return what was stored."""
    try:
        found = read(folder, rounds)
    except EdgeAdaptError:
        return True
    assert found == sound
    return False


def flipped(path: Path, places: list[int], seed: int = SEED) -> Iterator[int]:
    """Flip the byte at each place in turn; yields the place while it is flipped."""
    sound, generator = path.read_bytes(), random.Random(seed)  # noqa: S311
    for place in places:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ generator.randrange(1, 256)]) + sound[place + 1 :])
        yield place
    path.write_bytes(sound)


def test_a_flipped_byte_in_the_database_is_noticed_or_changes_nothing(folder: Path, rounds: Any) -> None:
    sound, path = read(folder, rounds), folder / "registry.db"
    raw = path.read_bytes()
    places = random.Random(SEED).sample([at for at, byte in enumerate(raw) if byte], FLIPS)  # noqa: S311
    assert sum(noticed(folder, rounds, sound) for _ in flipped(path, places)) > FLIPS // 2


def test_every_flipped_byte_of_a_signed_document_or_a_state_is_noticed(folder: Path, rounds: Any) -> None:
    """Of each document every 40th byte is tried, and of the last optimizer state every third one."""
    sound, path = read(folder, rounds), folder / "registry.db"
    raw = path.read_bytes()
    signed = [rounds.manifest(n).sign(rounds.key) for n in range(ROUNDS)]
    signed += [rounds.record(n).sign(rounds.key) for n in range(1, ROUNDS)] + [rounds.aborted(ROUNDS).sign(rounds.key)]
    unsigned = b'"keyid":"'
    for document, step in [*((each, 40) for each in signed), (files.encode(rounds.state(ROUNDS - 1)), 3)]:
        start, keyid = raw.rindex(document), document.find(unsigned) + len(unsigned)
        skipped = range(keyid, keyid + len(rounds.key.public.key_id)) if unsigned in document else range(0)
        places = [start + at for at in range(0, len(document), step) if at not in skipped]
        assert [at - start for at in flipped(path, places) if not noticed(folder, rounds, sound)] == []


def test_a_flipped_byte_in_a_blob_is_noticed(folder: Path, rounds: Any) -> None:
    sound = read(folder, rounds)
    for path in sorted((folder / "blobs").iterdir()):
        places = list(range(0, path.stat().st_size, 29))
        assert [at for at in flipped(path, places) if not noticed(folder, rounds, sound)] == []


def test_a_removed_blob_is_noticed(folder: Path, rounds: Any) -> None:
    sound = read(folder, rounds)
    for path in sorted((folder / "blobs").iterdir()):
        shutil.move(path, folder / "away")
        assert noticed(folder, rounds, sound)
        shutil.move(folder / "away", path)
