"""Enrolment on the device: make the identity and ask for its certificate, then take the certificate.

The private key is made here and never leaves. What the device relies on from then on is pinned at this moment: the
authority's certificate and the coordinator's key, as a person handed them over.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from adapters.storage import PRIVATE_FOLDER, new_folder, replace
from aggregation.entropy import Entropy
from aggregation.errors import TrustError, of_file
from aggregation.pki import Root, certificates, requests
from aggregation.pki.identity import IdentityKey, PublicKey
from client.node.statedir import (
    AUTHORITY,
    CERTIFICATE,
    COORDINATOR,
    IDENTITY,
    TRUST,
    DeviceSettings,
    DeviceStateDir,
    enrol,
)

REQUEST = "request.csr"


@dataclass(frozen=True, slots=True)
class Pinned:
    """Whom a device relies on: certificate and key in PEM, as handed over."""

    authority: bytes
    coordinator: bytes

    def __post_init__(self) -> None:
        with of_file("the authority's certificate"):
            Root.from_pem(self.authority)
        with of_file("the coordinator's key"):
            PublicKey.from_pem(self.coordinator)


def begin(folder: Path, name: str, base: str, pinned: Pinned, entropy: Entropy) -> PublicKey:
    """Make the home of a device and its request; the key to be certified. All of it is there afterwards, or nothing.

    Args:
        folder: New, or empty.
        name: Device id.
        base: As in ``device.toml``; a folder or file is written down with its whole path.
        pinned: Whom the device relies on.
        entropy: Draws identity and sealing key.

    Raises:
        ConfigError: The folder is not empty or the one that we are in, or a device cannot be called that.
    """
    identity = IdentityKey.generate(entropy)
    request = requests.request(identity, name)
    where = str(Path(base).resolve()) if Path(base).exists() else base
    trust = {
        AUTHORITY: pinned.authority,
        COORDINATOR: pinned.coordinator,
        # Whose files this device opens: the coordinator's, and its own private adapter's.
        TRUST: PublicKey.from_pem(pinned.coordinator).to_pem() + identity.public.to_pem(),
        REQUEST: request,
    }
    with new_folder(folder, mode=PRIVATE_FOLDER) as stage:
        enrol(stage, DeviceSettings(base=where), identity, trust, entropy)
    return identity.public


def finish(state_dir: DeviceStateDir, certificate: bytes, at: datetime) -> tuple[str, datetime]:
    """Take the certificate that the authority issued, or a newer one; the device's name, and when it ends.

    Args:
        home: Of the device.
        certificate: PEM or DER.
        at: Now.

    Raises:
        TrustError: It is not the pinned authority's, not for this device's key, revoked, or not valid now.
    """
    der = certificates.to_der(certificate)
    name, key = state_dir.root().verify(der, at)
    mine = IdentityKey.from_pem((state_dir.folder / IDENTITY).read_bytes()).public
    if key != mine:
        raise TrustError(f"the certificate is for the key {key.key_id}; this device has {mine.key_id}")
    replace(state_dir.folder / CERTIFICATE, der)
    return name, certificates.not_after(der)
