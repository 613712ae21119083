"""``edgeadapt.Coordinator`` and ``Device`` make state directories as the commands do."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import edgeadapt
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.authority import AuthorityStore
from edgeadapt.bases.base import Base
from edgeadapt.formats.gateway.invitation import Invitation
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
