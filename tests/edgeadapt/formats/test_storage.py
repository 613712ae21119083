"""A file or a folder is the old one or the new one, whatever happens in between."""

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats import files, storage
from edgeadapt.formats.blobs import Blobs
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.registryfiles import blob_name
from tests.support import refused
from tests.support.bucket import SECRET, Server
from tests.support.gateway import HOST, free_port


def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names in ``folder`` each time that the folder itself is written to the disk."""
    seen: list[list[str]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            seen.append(sorted(path.name for path in folder.iterdir()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


@contextmanager
def short_files() -> Iterator[None]:
    """Let no file grow beyond 1000 bytes: a write then fails in the system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_name_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(tmp_path, monkeypatch)
    storage.replace(tmp_path / "list", b"new")
    assert seen == [["list"]]


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.replace(tmp_path / "list", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.replace(tmp_path / "list", b"new")
    assert content(tmp_path) == {"list": b"old"}


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_file_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        storage.replace(tmp_path / "file", b"", mode)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_created_file_is_never_replaced(tmp_path: Path) -> None:
    storage.create(tmp_path / "key", b"first")
    with pytest.raises(FileExistsError):
        storage.create(tmp_path / "key", b"second")
    assert content(tmp_path) == {"key": b"first"}
    assert (tmp_path / "key").stat().st_mode & 0o777 == storage.PRIVATE


def test_a_full_disk_leaves_no_part_of_a_created_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        storage.create(tmp_path / "key", b"first")
    assert caught.value.filename == str(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_and_a_device_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with refused(DataError, name):
            storage.read(tmp_path / name)
        with refused(DataError, name):
            storage.read_lines(tmp_path / name, "label")
    with pytest.raises(IsADirectoryError):
        storage.read(tmp_path)


def test_lines_are_read_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(b"\xef\xbb\xbfLight\r\n\r\nLock\r\n")
    assert storage.read_lines(tmp_path / "labels", "label") == ("Light", "Lock")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert storage.read(tmp_path / "file", 5) == b"12345"
    with refused(DataError, "file", value=5):
        storage.read(tmp_path / "file", 4)


def test_a_new_authority_outlives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(tmp_path, monkeypatch)
    AuthorityStore.create(tmp_path / "authority", "fleet", 365, 30, b"a long passphrase")
    assert ["authority"] in seen


# --- locks


def test_a_lock_has_one_holder_among_threads(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with storage.locked(tmp_path / "lock"):
                inside.append(number)
                assert inside == [number]
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []


def test_a_lock_that_is_held_can_be_refused_instead_of_awaited_and_a_kill_releases_it(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from edgeadapt.formats.storage import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "lock"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(TimeoutError), storage.locked(tmp_path / "lock", timeout=0):
            pass
        process.kill()
    with storage.locked(tmp_path / "lock", timeout=0):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
def test_what_is_no_file_of_its_own_is_no_lock_and_is_not_touched(tmp_path: Path, kind: str) -> None:
    lock, victim = tmp_path / "lock", tmp_path / "victim"
    victim.write_bytes(b"content")
    {
        "link": lambda: lock.symlink_to(victim),
        "dangling": lambda: lock.symlink_to(tmp_path / "created"),
        "hard link": lambda: lock.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[kind]()
    for timeout in (-1, 0):
        with refused(ConfigError, "lock"), storage.locked(lock, timeout=timeout):
            pass
    assert victim.read_bytes() == b"content"
    assert not (tmp_path / "created").exists()
    if kind in ("link", "dangling"):  # one that takes the file's place after the look at it is not followed either
        with pytest.raises(OSError, match="symbolic"), storage.FileLock(lock):
            pass


def test_no_module_imports_fcntl_so_that_windows_can_import_them() -> None:
    modules = "edgeadapt.formats.storage, client.inference.session, client.node.statedir, edgeadapt.authority.store"
    script = f"import sys, filelock; sys.modules['fcntl'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- folders


def test_a_staged_folder_appears_whole_and_with_its_mode(tmp_path: Path) -> None:
    out = tmp_path / "above" / "out"
    with storage.staged(out, mode=0o700) as stage:
        (stage / "file").write_bytes(b"new")
        assert not out.exists()
    assert content(tmp_path) == {"above/out/file": b"new"}
    assert out.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("replaces", [False, True])
def test_an_error_in_the_block_leaves_the_old_folder_and_no_stage(tmp_path: Path, replaces: bool) -> None:
    storage.write_files(tmp_path / "out", {"file": b"old"})

    def write() -> None:
        with storage.staged(tmp_path / "out", replaces=replaces) as stage:
            (stage / "file").write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert content(tmp_path) == {"out/file": b"old"}


def test_a_folder_that_holds_files_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    storage.write_files(out, {"old": b"old"})
    with pytest.raises(OSError, match="not empty"), storage.staged(out) as stage:
        storage.write_files(stage, {"new": b"new"})
    assert content(tmp_path) == {"out/old": b"old"}
    with storage.staged(out, replaces=True) as stage:
        storage.write_files(stage, {"new": b"new"})
    assert content(tmp_path) == {"out/new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_half_replaced_is_repaired(tmp_path: Path) -> None:
    out, previous = tmp_path / "out", tmp_path / ".out.previous"
    storage.write_files(previous, {"file": b"old"})  # killed between the two renames
    with storage.locked_folder(out) as whole:
        assert content(whole) == {"file": b"old"}
    storage.write_files(previous, {"file": b"older"})  # killed after the second
    with storage.locked_folder(out) as whole:
        assert content(whole) == {"file": b"old"}
    assert not previous.exists()


def test_a_new_folder_is_refused_where_files_are_and_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("", "file"):
        with refused(ConfigError, (tmp_path / name).name), storage.new_folder(tmp_path / name):
            pass
    with storage.new_folder(tmp_path / "empty") as stage:
        (stage / "inner").write_bytes(b"x")
    assert content(tmp_path / "empty") == {"inner": b"x"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with refused(ConfigError, "here"), storage.new_folder(tmp_path / "here"):
        pass
    assert (tmp_path / "here").is_dir()


def test_a_linked_copy_shares_no_file_with_its_source_once_it_is_written(tmp_path: Path) -> None:
    storage.write_files(tmp_path / "a", {"sub/file": b"old", "other": b"same"})
    storage.link_files(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "other").samefile(tmp_path / "b" / "other")
    storage.write_files(tmp_path / "b", {"sub/file": b"new"})
    assert content(tmp_path / "a") == {"sub/file": b"old", "other": b"same"}
    assert content(tmp_path / "b") == {"sub/file": b"new", "other": b"same"}


def test_a_copy_without_hard_links_that_fills_the_disk_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_files(tmp_path / "a", {"sub/one": b"1", "sub/two": b"2", "three": b"3"})
    (tmp_path / "a" / "sub").chmod(0o700)
    monkeypatch.setattr(os, "link", lambda *_: full(0))
    storage.link_files(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert (tmp_path / "b" / "sub").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("edgeadapt.formats.storage.shutil.copyfile", lambda *_: full(0))
    with pytest.raises(OSError, match="No space") as caught:
        storage.link_files(tmp_path / "a", tmp_path / "c")
    assert caught.value.strerror == "No space left on device"
    storage.link_files(tmp_path / "none", tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: storage.replace(folder / "f", bytes(2000)),
        lambda folder: storage.create(folder / "f", bytes(2000)),
        lambda folder: storage.write_files(folder, {"f": bytes(2000)}),
    ],
    ids=["replace", "create", "write_files"],
)
def test_a_write_that_fails_names_the_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with short_files(), pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "f"))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda folder: (folder / "f").write_bytes(bytes(2000)), ""),
        (lambda folder: safetensors.numpy.save_file({"a": np.zeros(2000)}, folder / "f"), ""),
        (lambda folder: shutil.copyfile(sys.executable, folder / "f"), "f"),
    ],
    ids=["Python", "Rust", "a copy"],
)
def test_a_folder_that_cannot_be_written_is_named_and_not_the_one_that_is_deleted(
    tmp_path: Path, write: Callable[[Path], None], name: str
) -> None:
    with short_files(), pytest.raises(OSError, match="File too large") as caught, storage.staged(tmp_path / "o") as new:
        write(new)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "o" / name))
    assert [*tmp_path.iterdir()] == []


# Blobs in a bucket, over HTTP: whole or not at all, and whatever is missing, altered or away is one line.
BLOB = bytes(range(256)) * 40


def path_of(bucket: str, digest: str) -> str:
    return f"/{bucket.removeprefix('s3://')}/{blob_name(digest)}"


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    assert SECRET not in message
    return message


def test_a_blob_is_one_object_and_comes_back(bucket: str, bucket_server: Server) -> None:
    blobs = Blobs.open(bucket)
    digest = blobs.put(BLOB)
    assert Blobs.at(bucket).get(digest) == BLOB
    assert bucket_server.request("GET", path_of(bucket, digest)) == BLOB
    assert blobs.put(BLOB) == digest  # again
    assert blobs.put(b"") != digest
    assert blobs.get(blobs.put(b"")) == b""


def test_a_blob_that_is_missing_is_named(bucket: str) -> None:
    with refused(DataError, "blob", value="00" * 32) as caught:
        Blobs.open(bucket).get("00" * 32)
    assert bucket in one_line(caught.value)


@pytest.mark.parametrize("content", [b"", BLOB[:-1], BLOB + b"\0", b"x" * len(BLOB)])
def test_an_object_that_was_altered_is_refused(bucket: str, bucket_server: Server, content: bytes) -> None:
    blobs = Blobs.open(bucket)
    digest = blobs.put(BLOB)
    bucket_server.request("PUT", path_of(bucket, digest), content)
    with refused(TrustError, "blob", value=digest) as caught:
        blobs.get(digest)
    assert bucket in one_line(caught.value)


def test_an_upload_that_is_cut_off_leaves_what_was_there(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy takes half of the object, and then no more."""
    blobs = Blobs.open(bucket)
    digest = blobs.put(BLOB)
    with cutting() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}:{port}")
        cut = Blobs(
            type(blobs.fs)(skip_instance_cache=True, config_kwargs={"retries": {"max_attempts": 1}}), blobs.root
        )
        with refused(EdgeAdaptError, "blobs") as caught:
            cut.put(BLOB + b"more")
    assert "nothing was changed" in one_line(caught.value)
    assert blobs.get(digest) == BLOB
    assert [name.rpartition("/")[2] for name in blobs.fs.ls(blobs.root)] == [blob_name(digest)]


def test_a_server_that_is_away_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}:{free_port()}")
    blobs = away(bucket)
    for call in (lambda: blobs.put(BLOB), lambda: blobs.get("00" * 32)):
        with refused(EdgeAdaptError, "blobs") as caught:
            call()
        assert bucket in one_line(caught.value)
    with refused(EdgeAdaptError, "blobs"), blobs.reserved(BLOB):
        pytest.fail("a round would begin whose adapter has no place")


def test_a_bucket_that_is_not_there_is_not_made(bucket: str, bucket_server: Server) -> None:
    elsewhere = Blobs.open("s3://nowhere/fleet")
    with refused(EdgeAdaptError, "blobs") as caught:
        elsewhere.put(BLOB)
    assert "s3://nowhere/fleet" in one_line(caught.value)
    assert b"nowhere" not in bucket_server.request("GET", "/")


def test_without_keys_nothing_is_sent(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with refused(EdgeAdaptError, "blobs") as caught:
        away(bucket).put(BLOB)
    assert "credentials" in one_line(caught.value)


def away(bucket: str) -> Blobs:
    """As ``Blobs.open`` in a new process: fsspec keeps a connection for each address."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    return Blobs.open(bucket)


@contextmanager
def cutting() -> Iterator[int]:
    """The port of a server that takes the beginning of an object, and closes the connection."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            with suppress(OSError):  # until the block ends
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")  # which boto waits for
                        connection.recv(len(BLOB) // 2)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_store_that_connects_at_once_and_cannot_be_reached_is_named() -> None:
    url = f"ftp://{HOST}:{free_port()}/fleet"
    with refused(EdgeAdaptError, "blobs.url", value=url) as caught:
        Blobs.at(url)
    assert url in str(caught.value)


# Adapter files: deterministic bytes that plain safetensors opens, and damage that always ends in a ``DataError``.
TENSORS: Tensors = {
    "base.classifier.bias": np.array([0.5, -0.25], np.float32),
    "base.query.lora_A.weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "base.query.lora_B.weight": np.zeros((4, 3), np.float32),
}
LAYOUT = Layout.of(TENSORS)
TENSOR_FILE = files.encode(TENSORS)


def _equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_decode_gives_back_what_encode_took() -> None:
    assert _equal(files.decode(TENSOR_FILE, LAYOUT), TENSORS)
    assert _equal(files.decode(TENSOR_FILE), TENSORS)


def test_equal_tensors_give_equal_bytes_in_any_order_and_any_memory_layout() -> None:
    shuffled = {name: np.asfortranarray(TENSORS[name]) for name in reversed(TENSORS)}
    assert files.encode(shuffled) == TENSOR_FILE
    assert files.sha256(files.encode(shuffled)) == files.sha256(TENSOR_FILE)


def test_a_strided_view_is_written_by_value() -> None:
    wide = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (wide[:, ::2], wide.T, wide[::-1]):
        assert np.array_equal(files.decode(files.encode({"a": view}))["a"], view)


def test_a_scalar_tensor_keeps_its_shape() -> None:
    assert files.decode(files.encode({"a": np.array(3, np.float32)}))["a"].shape == ()


def test_the_bytes_of_a_known_adapter_never_change() -> None:
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    padded = header + b" " * (-len(header) % 8)
    expected = len(padded).to_bytes(8, "little") + padded + np.array([1, 2], "<f4").tobytes()
    assert files.encode({"a": np.array([1, 2], np.float32)}) == expected


def test_plain_safetensors_opens_the_file() -> None:
    assert _equal(safetensors.numpy.load(TENSOR_FILE), TENSORS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_neither_written_nor_read(value: float) -> None:
    broken = {**TENSORS, "base.classifier.bias": np.array([0.5, value], np.float32)}
    with refused(DataError, "base.classifier.bias", value=None):
        files.encode(broken)
    with refused(DataError, "base.classifier.bias", value=None):
        files.decode(safetensors.numpy.save(broken))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8])
def test_tensors_of_another_type_are_refused(dtype: type) -> None:
    with refused(DataError, "a", value=f"{np.dtype(dtype)} [3]"):
        files.decode(safetensors.numpy.save({"a": np.zeros(3, dtype)}))


def test_bfloat16_which_numpy_lacks_is_refused() -> None:
    with pytest.raises(DataError):
        files.decode(files.encode({"a": np.zeros(3, np.float32)}).replace(b'"F32"', b'"BF16"'))
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    with refused(DataError, "adapter", value=None):
        files.decode(len(header).to_bytes(8, "little") + header + bytes(4))


def test_an_adapter_of_another_layout_is_refused() -> None:
    with refused(DataError, "base.classifier.bias", value="missing"):
        files.decode(files.encode({"other": np.zeros(2, np.float32)}), LAYOUT)


def test_a_file_without_tensors_is_refused() -> None:
    with refused(DataError, "layout"):
        files.decode(safetensors.numpy.save({}))


def test_an_oversized_file_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ADAPTER", len(TENSOR_FILE) - 1)
    monkeypatch.setattr(files, "load", lambda _: pytest.fail("parsed"))
    with refused(DataError, "adapter", value=len(TENSOR_FILE)):
        files.decode(TENSOR_FILE)


def test_a_header_that_claims_a_huge_tensor_is_refused() -> None:
    header = b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,18446744073709551615]}}'
    with refused(DataError, "adapter", value=None):
        files.decode(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("length", range(0, len(TENSOR_FILE), 7))
def test_a_truncated_file_is_refused(length: int) -> None:
    with refused(DataError, "adapter", value=None):
        files.decode(TENSOR_FILE[:length], LAYOUT)


def test_a_file_with_bytes_left_over_is_refused() -> None:
    with refused(DataError, "adapter", value=None):
        files.decode(TENSOR_FILE + b"\0", LAYOUT)


def test_a_flipped_byte_in_names_shapes_types_or_offsets_is_refused() -> None:
    start, end = 8 + TENSOR_FILE[8:].index(b'"base.'), 8 + int.from_bytes(TENSOR_FILE[:8], "little")
    header = TENSOR_FILE[:end].rstrip()
    for position in range(start, len(header)):
        with pytest.raises(DataError):
            files.decode(
                TENSOR_FILE[:position] + bytes([TENSOR_FILE[position] ^ 1]) + TENSOR_FILE[position + 1 :], LAYOUT
            )
