"""``edgeadapt.audit`` gives what the command prints: true if everything passed, and else what failed."""

import json
from datetime import UTC, datetime
from pathlib import Path

from click.testing import CliRunner

import edgeadapt
from aggregation.entropy import SystemEntropy
from edgeadapt.auditing.transcripts import log_name
from edgeadapt.program import cli
from edgeadapt.releases.repository import ChannelRepository
from tests.support import refused


def test_an_audit_is_true_and_has_the_checks_of_the_command(audited: Path) -> None:
    audit = edgeadapt.audit(str(audited))
    printed = json.loads(CliRunner().invoke(cli, ["audit", "verify", str(audited), "--json"]).stdout)
    (session,) = printed["sessions"]
    assert (bool(audit), audit.error, audit.failed) == (True, None, ())
    assert [check.text for check in audit.checks] == [check["text"] for check in session["checks"]]
    assert audit._repr_html_().count("<tr>") == len(audit.checks)


def test_a_failed_check_and_sessions_without_a_chain_make_it_false(audited: Path) -> None:
    log = audited / "coordinator" / "transcript" / log_name(1)
    raw = log.read_bytes()
    log.with_name(log_name(2)).write_bytes(raw)  # a session after it would name the one that is between
    missing = edgeadapt.audit(audited)
    assert (missing.ok, [check for check in missing.failed if check.check.value != "repeats"]) == (False, [])
    assert str(missing).startswith("FAIL: ")
    log.with_name(log_name(2)).unlink()
    log.write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
    damaged = edgeadapt.audit(audited)
    assert not damaged
    assert any(check.text in str(damaged.error) for check in damaged.failed)


def test_releases_are_audited_with_the_root_that_is_trusted(tmp_path: Path) -> None:
    repository = ChannelRepository.create(tmp_path / "releases", SystemEntropy(), datetime.now(UTC))
    (tmp_path / "root.json").write_bytes(repository.root())
    audit = edgeadapt.audit(repository.folder, root=str(tmp_path / "root.json"))
    assert audit.releases is not None
    assert (bool(audit), str(audit), audit.releases.pinned) == (True, "pass: 1 actions", True)
    (tmp_path / "root.json").write_bytes(b"{}")
    assert not edgeadapt.audit(repository.folder, root=tmp_path / "root.json")


def test_errors_name_arguments_of_python(audited: Path, tmp_path: Path) -> None:
    with refused(edgeadapt.ConfigError, "root") as caught:
        edgeadapt.audit(audited, root="root.json")
    assert str(caught.value).startswith("root= is for")
    (audited / "coordinator" / "transcript" / "authority.pem").unlink()
    with refused(edgeadapt.TrustError, "authority") as missing:
        edgeadapt.audit(audited)
    assert "name the file with authority=" in str(missing.value)
