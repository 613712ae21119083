"""`edgeadapt authority` as a person calls it, with the passphrase from a file or typed."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.pki import Root, certificates, requests
from coordinator.cli import authority_group as authority
from tests.support import refused
from tests.support.authority import PASSPHRASE, new_key

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(PASSPHRASE + b"\n")

    def call(*arguments: str, typed: str | None = None) -> Result:
        return CliRunner().invoke(authority, arguments, input=typed)

    return call


def ok(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def failed(result: Result, kind: type[EdgeAdaptError], about: str = "", text: str = "") -> None:
    """The command ended with this error, about this or with this text in its one line."""
    error = result.exception
    assert isinstance(error, kind), (result.output, error)
    assert about in ("", error.about), error.about
    assert text in str(error)
    assert "\n" not in str(error)


def test_from_init_to_revoke_by_command(run: Run, tmp_path: Path) -> None:
    mine = new_key()
    (tmp_path / "kitchen.csr").write_bytes(requests.request(mine, "kitchen"))
    (tmp_path / "garage.pub").write_bytes(new_key().public.to_pem())
    secret = ("--passphrase-file", "secret")
    printed = ok(run("init", "dir", *secret))
    root = Root.from_pem((tmp_path / "dir" / "authority.pem").read_bytes())
    assert root.fingerprint in printed
    assert "pin dir/authority.pem" in printed
    printed = ok(run("issue", "dir", "--request", "kitchen.csr", "--days", "7", "--out", "kitchen.pem", *secret))
    assert mine.public.key_id in printed
    certificate = certificates.to_der((tmp_path / "kitchen.pem").read_bytes())
    assert root.verify(certificate, datetime.now(UTC))[0] == "kitchen"
    assert "BEGIN CERTIFICATE" in ok(run("issue", "dir", "--name", "garage", "--public-key", "garage.pub", *secret))
    assert "serial" in ok(run("revoke", "dir", "kitchen", "--reason", "keyCompromise", *secret))
    assert "already revoked" in ok(run("revoke", "dir", "kitchen", *secret))
    listed = json.loads(ok(run("list", "dir", "--json")))["certificates"]
    assert [(each["name"], each["status"]) for each in listed] == [
        ("kitchen", "revoked (keyCompromise)"),
        ("garage", "valid"),
    ]
    assert ok(run("list", "dir")).count("\n") == 2
    assert "revocation list 4" in ok(run("revoke", "dir", "--list-days", "5", *secret))
    with refused(TrustError, "certificate.revoked", value="kitchen"):
        root.with_revocations((tmp_path / "dir" / "revoked.crl").read_bytes()).verify(certificate)


def test_the_passphrase_is_asked_for_and_never_shown(run: Run, tmp_path: Path) -> None:
    typed = PASSPHRASE.decode()
    assert typed not in ok(run("init", "dir", typed=f"{typed}\n{typed}\n"))
    assert typed not in ok(run("revoke", "dir", typed=f"{typed}\n"))
    failed(run("revoke", "dir", typed="something else\n"), TrustError, "key.passphrase", "authority.key: ")
    assert typed.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "dir").iterdir())


def test_a_key_without_a_passphrase_must_be_asked_for(run: Run) -> None:
    failed(run("init", "dir", typed=""), ConfigError, "--passphrase-file")
    ok(run("init", "dir", "--unencrypted"))
    ok(run("revoke", "dir"))
    failed(run("init", "other", "--unencrypted", "--passphrase-file", "secret"), ConfigError, "--unencrypted")


def test_options_that_contradict_each_other_are_refused(run: Run, tmp_path: Path) -> None:
    ok(run("init", "dir", "--unencrypted"))
    (tmp_path / "kitchen.csr").write_bytes(requests.request(new_key(), "kitchen"))
    (tmp_path / "kitchen.pub").write_bytes(new_key().public.to_pem())
    failed(run("issue", "dir"), ConfigError, "--request")
    failed(run("issue", "dir", "--request", "kitchen.csr", "--public-key", "kitchen.pub"), ConfigError, "--request")
    failed(run("issue", "dir", "--public-key", "kitchen.pub"), ConfigError, "--name")
    failed(run("issue", "dir", "--request", "kitchen.csr", "--out", "no/kitchen.pem"), ConfigError, "--out")
    failed(run("issue", "dir", "--request", "kitchen.csr", "--name", "garage"), ConfigError, "--name")
    failed(run("issue", "dir", "--request", "kitchen.pub"), TrustError, "request", "kitchen.pub: ")
    failed(run("issue", "dir", "--name", "a", "--public-key", "kitchen.csr"), TrustError, "key.pem", "kitchen.csr: ")
    assert run("revoke", "dir", "kitchen", "--reason", "whim").exit_code == 2
    assert ok(run("list", "dir")) == ""


def test_a_file_without_an_end_is_not_waited_for(run: Run) -> None:
    failed(run("init", "dir", "--passphrase-file", "/dev/zero"), ConfigError, "passphrase")
    ok(run("init", "dir", "--unencrypted"))
    failed(run("issue", "dir", "--request", "/dev/zero"), EdgeAdaptError, text="/dev/zero")
    failed(run("issue", "dir", "--name", "garage", "--public-key", "/dev/zero"), EdgeAdaptError, text="/dev/zero")
