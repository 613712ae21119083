"""``edgeadapt.Coordinator``, ``Device`` and ``audit`` do what the commands do."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import edgeadapt
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing.transcripts import log_name
from edgeadapt.authority import AuthorityStore
from edgeadapt.bases.base import Base
from edgeadapt.formats.gateway.invitation import Invitation
from edgeadapt.program import cli
from edgeadapt.releases.repository import ChannelRepository
from tests.support import refused
from tests.support.authority import signer, store
from tests.support.gateway import HOST
from tests.support.models import LABELS

__all__ = ["signer", "store"]


def test_a_coordinator_is_made_and_publishes_a_first_adapter_once(
    tmp_path: Path, store: AuthorityStore, model: Any, tiny_base: Base
) -> None:
    (tmp_path / "authority.pem").write_bytes(store.root.to_pem())
    model.save_pretrained(tmp_path / "my-lora")
    fleet = edgeadapt.Coordinator.create(
        str(tmp_path / "fleet"), authority=tmp_path / "authority.pem", rounds=7, aggregation__minimum_devices=4
    )
    settings = CoordinatorStateDir.open(fleet.path).settings
    assert (settings.rounds, settings.aggregation.minimum_devices) == (7, 4)
    first = fleet.publish(tmp_path / "my-lora", base=tiny_base.folder, labels=LABELS)
    assert (first.labels, fleet.versions()) == (LABELS, (first,))
    with refused(edgeadapt.ConfigError, "version"):
        fleet.publish(tmp_path / "my-lora", base=tiny_base.folder, labels=LABELS)
    with refused(edgeadapt.ConfigError, "labels"):
        fleet.publish(tmp_path / "my-lora", base=tiny_base.folder, labels="Light")
    with refused(edgeadapt.ConfigError, "round"):
        edgeadapt.Coordinator.create(tmp_path / "other", authority=tmp_path / "authority.pem", round=7)
    assert not (tmp_path / "other").exists()


def test_a_device_is_enrolled_by_an_invitation(store: AuthorityStore, signer: Authority, tmp_path: Path) -> None:
    server = EnrolmentServer(EnrolmentService(store, signer, 30), f"{HOST}:0", [HOST])
    entropy, address = SystemEntropy(), f"{HOST}:{server.port}"
    coordinator = IdentityKey.generate(entropy).public.raw
    invitation = Invitation(entropy.bytes(16), "kitchen", address, address, store.root.der, coordinator)
    store.invite("kitchen", invitation.key.public, 1.0)
    try:
        device = edgeadapt.Device.enrol(
            str(tmp_path / "kitchen"), base="some_base", token=invitation.to_text(), policy__minimum_cohort=9
        )
    finally:
        server.close()
    assert (device.name, device.policy.minimum_cohort) == ("kitchen", 9)
    assert device.valid_until > datetime.now(UTC)
    with refused(edgeadapt.ConfigError, "gateway") as caught:
        device.run("kitchen")
    assert str(caught.value).startswith("gateway= is 'kitchen'")
    with refused(edgeadapt.ConfigError, "token"):
        edgeadapt.Device.enrol(tmp_path / "hall", base="some_base", token="what?")  # noqa: S106
    with refused(edgeadapt.ConfigError, "device.toml"):
        edgeadapt.Device(tmp_path)


# Audits


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
