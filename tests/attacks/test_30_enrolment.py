"""Names, certificates and lists that a fleet would take for others: by the commands of authority and device."""

import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Root, certificates, requests
from aggregation.pki.revocation import RevocationList
from edgeadapt.authority import AuthorityStore
from tests.support import refused
from tests.support.authority import new_key, store
from tests.support.trial import call

__all__ = ["store"]
NAMES = [
    "",
    "kitchen\n",
    "kit\0chen",
    "kit\x1b[2Kchen",
    "kitchen ",
    " kitchen",
    "kitchen.",
    "kitchen\u200b",
    "\u202enehctik",
    "\u043aitchen",
    "\uff4bitchen",
    "..",
    "../kitchen",
    "a" * 65,
]


@pytest.fixture
def work(tmp_path: Path, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The authority, a coordinator's public key, and the device ``kitchen``, enrolled by commands."""
    monkeypatch.chdir(tmp_path)
    Path("coordinator.pem").write_bytes(new_key().public.to_pem())
    enrol("kitchen", "authority/authority.pem")
    call("authority", "issue", "authority", "--request", "kitchen/request.csr", "--out", "kitchen.crt")
    call("device", "enrol", "--state", "kitchen", "--certificate", "kitchen.crt")
    return tmp_path


def enrol(name: str, authority: str) -> None:
    pinned = ("--authority", authority, "--coordinator", "coordinator.pem")
    call("device", "enrol", "--state", name, "--name", name, "--base", "base", *pinned)


def names(store: AuthorityStore) -> list[str]:
    return [issued.name for issued, _ in store.certificates()]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_looks_like_another_is_not_certified(
    work: Path, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    key, private = new_key(), Ed25519PrivateKey.generate()
    Path("other.pub").write_bytes(key.public.to_pem())
    by_key = ("authority", "issue", "authority", "--name", name, "--public-key", "other.pub")
    with refused(ConfigError, "device.id"):
        call(*by_key)
    if 0 < len(name) <= 64:  # the library makes no other request
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        asked = x509.CertificateSigningRequestBuilder(subject).sign(private, None)
        Path("other.csr").write_bytes(asked.public_bytes(serialization.Encoding.PEM))
        with refused(TrustError, "request.common-name"):
            call("authority", "issue", "authority", "--request", "other.csr")
        assert names(store) == ["kitchen"]
        monkeypatch.setattr(certificates, "_DEVICE_ID", re.compile(".*", re.DOTALL))
        call("authority", "issue", "authority", "--request", "other.csr")
        assert names(store) == ["kitchen", name]


def test_a_device_does_not_install_the_authoritys_certificate(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = ("device", "enrol", "--state", "kitchen", "--certificate", "authority/authority.pem")
    with refused(TrustError, "certificate.basic-constraints"):
        call(*install)
    monkeypatch.setattr(Root, "from_pem", lambda pem: Root(certificates.to_der(pem)))
    monkeypatch.setattr(certificates, "is_authority", lambda certificate: False)
    with refused(TrustError, "certificate.key"):  # a second line: no device has the authority's key
        call(*install)


def test_no_device_pins_another_device_as_its_authority(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(TrustError, "authority.certificate"):  # it is not self-signed
        enrol("hall", "kitchen.crt")
    assert not Path("hall").exists()
    monkeypatch.setattr(Root, "from_pem", lambda pem: Root(certificates.to_der(pem)))
    enrol("hall", "kitchen.crt")


def test_a_list_of_another_authority_of_the_same_name_is_not_installed(
    work: Path, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    AuthorityStore.create(work / "twin", "fleet", 3650, 30, None)
    install = ("device", "enrol", "--state", "kitchen", "--revoked", "twin/revoked.crl")
    with refused(TrustError, "revocations.signature"):
        call(*install)
    assert not Path("kitchen/revoked.crl").exists()


def test_a_list_with_a_lower_number_is_not_installed_and_without_the_check_it_reinstates_a_device(
    work: Path, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Path("authority/revoked.crl").read_bytes()
    Path("old.crl").write_bytes(old)
    call("authority", "revoke", "authority", "kitchen")
    call("device", "enrol", "--state", "kitchen", "--revoked", "authority/revoked.crl")
    install = ("device", "enrol", "--state", "kitchen", "--revoked", "old.crl")
    with refused(TrustError, "revocations.number", value=1):
        call(*install)
    monkeypatch.setattr(RevocationList, "newer_than", lambda listed, seen: listed)
    call(*install)
    assert not store.root.revocations(Path("kitchen/revoked.crl").read_bytes()).revoked


def test_one_name_has_one_key_and_one_key_has_one_name(
    work: Path, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("stranger.csr").write_bytes(requests.request(new_key(), "kitchen"))
    same_name = ("authority", "issue", "authority", "--request", "stranger.csr")
    with refused(ConfigError, "name.key"):
        call(*same_name)
    public = certificates.identity(certificates.load(certificates.to_der(Path("kitchen.crt").read_bytes())))
    Path("kitchen.pub").write_bytes(public.to_pem())
    same_key = ("authority", "issue", "authority", "--name", "hall", "--public-key", "kitchen.pub")
    with refused(ConfigError, "key.name"):
        call(*same_key)
    assert names(store) == ["kitchen"]
    monkeypatch.setattr("edgeadapt.authority.store.require_new", lambda *given: None)
    call(*same_name)
    call(*same_key)
    assert names(store) == ["kitchen", "kitchen", "hall"]
