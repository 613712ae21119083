"""Blobs in a bucket, over HTTP: whole or not at all, and whatever is missing, altered or away is one line."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from aggregation.errors import DataError, EdgeAdaptError, TrustError
from edgeadapt.formats.blobs import Blobs
from edgeadapt.formats.registryfiles import blob_name
from tests.support import refused
from tests.support.bucket import SECRET, Server
from tests.support.gateway import HOST, free_port

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
