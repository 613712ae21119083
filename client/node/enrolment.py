"""Enrolment of a device: create its identity and a certificate request, then install the certificate.

The private key is created here and never leaves the device. The trust anchors are pinned at the same time: the
authority's certificate and the coordinator's key, as the owner of the device received them.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from aggregation.entropy import Entropy
from aggregation.errors import TrustError, of_file
from aggregation.pki import Root, certificates, requests
from aggregation.pki.identity import IdentityKey, PublicKey
from client.node.statedir import AUTHORITY, CERTIFICATE, COORDINATOR, TRUST, DeviceSettings, DeviceStateDir
from edgeadapt.bases.tasks import find_task
from edgeadapt.formats.storage import PRIVATE_FOLDER, new_folder, replace

REQUEST = "request.csr"


@dataclass(frozen=True, slots=True)
class TrustAnchors:
    """The authority's certificate and the coordinator's public key, both PEM, that a device pins. Raises TrustError:
    one of them is not valid."""

    authority: bytes
    coordinator: bytes

    def __post_init__(self) -> None:
        with of_file("the authority's certificate"):
            Root.from_pem(self.authority)
        with of_file("the coordinator's key"):
            PublicKey.from_pem(self.coordinator)


def enrol(folder: Path, name: str, settings: DeviceSettings, anchors: TrustAnchors, entropy: Entropy) -> PublicKey:
    """Create a state directory with a certificate request, completely or not at all, and return the key to certify.

    ``folder`` is new or empty; the path of a base that is a folder or a file is made absolute in the settings. Raises
    ConfigError: the folder is not empty or is the working directory, the name is not valid, or as ``find_task``.
    """
    find_task(settings.task)
    identity = IdentityKey.generate(entropy)
    request = requests.request(identity, name)
    base = Path(settings.base)
    settings = settings.model_copy(update={"base": str(base.resolve())}) if base.exists() else settings
    trust = {
        AUTHORITY: anchors.authority,
        COORDINATOR: anchors.coordinator,
        # The device opens adapters of the coordinator, and its own personal adapter.
        TRUST: PublicKey.from_pem(anchors.coordinator).to_pem() + identity.public.to_pem(),
        REQUEST: request,
    }
    with new_folder(folder, mode=PRIVATE_FOLDER) as stage:
        DeviceStateDir.create(stage, settings, identity, trust, entropy)
    return identity.public


def install_certificate(state_dir: DeviceStateDir, certificate: bytes, at: datetime) -> tuple[str, datetime]:
    """Install the certificate, PEM or DER, that the authority issued. Returns the device's name and its end. Raises
    TrustError: the pinned authority did not issue it, it is for another key or revoked, or not valid at ``at``."""
    der = certificates.to_der(certificate)
    name, key = state_dir.root().verify(der, at)
    own = state_dir.identity.public
    if key != own:
        reason = f"the certificate is for the key {key.key_id}, and this device's key is {own.key_id}"
        raise TrustError(f"{reason}; ask the authority to certify {REQUEST} of this device", about="certificate.key")
    replace(state_dir.folder / CERTIFICATE, der)
    return name, certificates.not_after(der)
