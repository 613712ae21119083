"""The authority's folder, and what an authority does. Keep it off the coordinator's machine, and offline.

    authority.key   the private key, PKCS #8, under a passphrase; readable by its owner only
    authority.pem   the certificate that devices and coordinator pin
    revoked.crl     the newest revocation list, for the coordinator
    record.jsonl    every certificate, revocation and list (``record``)

The private key is read only to sign. Anyone who has it can enrol any number of devices.

Which names and keys, invitations and renewals are allowed follows from the record."""

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self, TypeAlias

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError, of_file
from aggregation.pki import Authority, Root, new_serial
from aggregation.pki.certificates import load, require_device_id, same_name, serial
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.requests import read_request
from aggregation.pki.revocation import AHEAD, MAX_REVOCATIONS, Reason, Revocation
from aggregation.pki.tls import TlsPublicKey
from edgeadapt.authority import record
from edgeadapt.formats import storage
from edgeadapt.formats.gateway import invitation
from edgeadapt.formats.gateway.messages import RENEWAL_TAG
from edgeadapt.formats.keyfiles import MAX_PEM
from edgeadapt.formats.storage import PRIVATE, PRIVATE_FOLDER, PUBLIC

KEY, CERTIFICATE, REVOKED, RECORD = "authority.key", "authority.pem", "revoked.crl", "record.jsonl"
SHORTEST_PASSPHRASE = 12  # characters: one guess at PKCS #8 as OpenSSL writes it takes a millisecond
LIMITS = {KEY: MAX_PEM, CERTIFICATE: MAX_PEM, REVOKED: 2 * MAX_REVOCATIONS, RECORD: 2**28}  # bytes
Admit: TypeAlias = Callable[[str], None]  # counts a call of the device that has proved this; may raise
SKEW = timedelta(hours=1)  # a device's clock may be behind
RENEWABLE = 1 / 2  # share of the validity that is left; devices ask at 1/3, and clocks differ
ENROL_AGAIN = "enrol this device again, with a token"
NOT_REDEEMABLE = "the invitation is not valid, has expired, or was used: ask for a new one"


def utc_now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True, slots=True)
class AuthorityStore:
    """Manages an authority's folder. ``clock`` says what time it is. Methods raise ConfigError if the folder has no
    authority, TrustError if a key or certificate is damaged, and DataError if the record is damaged or lacks lines of
    the newest list."""

    folder: Path
    clock: Callable[[], datetime] = utc_now

    @classmethod
    def create(cls, folder: Path, name: str, days: int, list_days: int, passphrase: bytes | None) -> Self:
        """Create an authority with an empty revocation list. Afterwards the folder has all its files, or none.

        The certificate is valid for ``days``, the first list for ``list_days``. Without a passphrase the key is plain.
        Raises ConfigError: the folder is not empty or is the working directory, the name cannot be in a certificate, or
        the passphrase is too short."""
        if passphrase is not None and len(passphrase) < SHORTEST_PASSPHRASE:
            text = f"the passphrase has fewer than {SHORTEST_PASSPHRASE} characters: choose a longer one"
            raise ConfigError(text, about="passphrase")
        now = utc_now()
        authority = Authority.create(name, SystemEntropy(), now - SKEW, now + timedelta(days))
        with storage.new_folder(folder, mode=PRIVATE_FOLDER) as stage:
            storage.replace(stage / KEY, authority.key.to_pem(passphrase), PRIVATE)
            storage.replace(stage / CERTIFICATE, authority.root.to_pem(), PUBLIC)
            storage.replace(stage / RECORD, b"", PRIVATE)
            cls(stage).sign_list(authority, list_days)
        return cls(folder)

    @property
    def encrypted(self) -> bool:
        return b"ENCRYPTED" in self._read(KEY)

    @property
    def root(self) -> Root:
        with of_file(self.folder / CERTIFICATE):
            return Root.from_pem(self._read(CERTIFICATE))

    def unlock(self, passphrase: bytes | None) -> Authority:
        """Open the authority with its private key. Raises TrustError if the passphrase is wrong."""
        with of_file(self.folder / KEY):
            key = IdentityKey.from_pem(self._read(KEY), passphrase)
        authority = Authority(key, self.root.der)
        if authority.key.public != authority.root.key:
            text = f"{self.folder}: {KEY} and {CERTIFICATE} are of two authorities; restore the folder from a backup"
            raise TrustError(text, about=KEY)
        return authority

    def issue(self, authority: Authority, name: str, key: PublicKey, days: float) -> bytes:
        """Certify that ``key`` is the key of the device ``name``, valid from now on; DER. Raises ConfigError: the
        certificate would outlast the authority; the key is another device's or was revoked; the device has a valid
        certificate with another key; or another device's name differs in case only."""
        with self._writing() as writer:
            return self._issue(writer, authority, name, key, self._end(authority, name, days))

    def _issue(
        self, writer: record.RecordWriter, authority: Authority, name: str, key: PublicKey, end: datetime
    ) -> bytes:
        require_new(writer, name, key, self.clock())
        begin, serial = self.clock() - SKEW, new_serial(SystemEntropy())
        der = authority.issue(name, key, not_before=begin, not_after=end, serial=serial)
        self._add(writer, name, key.key_id, der, record.Purpose.IDENTITY)
        return der

    def issue_tls(self, authority: Authority, name: str, key: TlsPublicKey, hosts: Sequence[str], days: float) -> bytes:
        """Certify that ``key`` (P-256) is the TLS key of the gateway ``name`` at ``hosts``, valid from now on; DER.
        Raises ConfigError: the certificate would outlast the authority, or as ``Authority.issue_tls``."""
        with self._writing() as writer:
            begin, end, serial = self.clock() - SKEW, self._end(authority, name, days), new_serial(SystemEntropy())
            der = authority.issue_tls(name, key, hosts, not_before=begin, not_after=end, serial=serial)
            self._add(writer, name, key.key_id, der, record.Purpose.GATEWAY_TLS)
            return der

    def invite(self, name: str, invited: PublicKey, hours: float) -> datetime:
        """Let the device ``name`` enrol over a network once, with the key ``invited``; return until when. The secret
        half of the invitation's key is not kept. Raises ConfigError if a device cannot have this name."""
        now, name = self.clock(), require_device_id(name)
        expires = now + timedelta(hours=hours)
        with self._writing() as writer:
            writer.add(record.InvitationIssued(at=now, name=name, token=invited.raw.hex(), expires=expires))
        return expires

    def redeem(
        self, authority: Authority, invited: bytes, signature: bytes, request: bytes, *, days: float, admit: Admit
    ) -> bytes:
        """Certify the identity of an invited device, DER. For the same key again, return the same certificate.

        ``invited``: the public half of the invitation's key, raw. ``signature``: made with that key over the request:
        who passes it on can have no other key certified. ``admit``: called with ``invited`` in hex once the signature
        was verified, before the record is locked; may raise. Raises TrustError: the invitation is unknown, has expired,
        or was used for another key; or the signature or the request is not valid, or for another name; ConfigError as
        ``issue``."""
        public, token = PublicKey(invited), invited.hex()
        public.verify(invitation.ENROLMENT, request, signature)
        name, key = read_request(request)
        admit(token)
        with self._writing() as writer:
            require_redeemable(writer.events, token, name, key.key_id, self.clock())
            if not any(isinstance(event, record.InvitationUsed) and event.token == token for event in writer.events):
                require_new(writer, name, key, self.clock())
                writer.add(record.InvitationUsed(at=self.clock(), token=token, key=key.key_id))
            issued = certificate_of(writer.events, key.key_id)
            return issued or self._issue(writer, authority, name, key, self._end(authority, name, days))

    def renew(self, authority: Authority, certificate: bytes, signature: bytes, *, days: float, admit: Admit) -> bytes:
        """Certify again the identity of a device whose certificate is valid; DER.

        Its newest certificate is returned as long as that does not end soon. ``signature``: made by the identity over
        ``certificate``. ``days``: the new one is valid as long, or until the authority ends. ``admit``: called with the
        device's name once it has proved it; may raise. Raises TrustError: the certificate has expired, was revoked, or
        is not of this authority; or the identity did not sign; ConfigError as ``issue``."""
        now = self.clock()
        try:
            name, key = authority.root.verify(certificate, now)
            key.verify(RENEWAL_TAG, certificate, signature)
        except TrustError as error:
            raise TrustError(f"{error}: {ENROL_AGAIN}", about=error.about) from error
        admit(name)
        with self._writing() as writer:
            require_unrevoked(writer.events, name, serial(certificate))
            require_new(writer, name, key, now)
            end = min(now + timedelta(days), authority.root.not_after)  # no person chooses fewer days
            lasting = lasting_certificate_of(writer.events, name, key.key_id, now, end)
            return lasting or self._issue(writer, authority, name, key, end)

    def _end(self, authority: Authority, name: str, days: float) -> datetime:
        end, name = self.clock() + timedelta(days), require_device_id(name)
        if end > authority.root.not_after:
            text = f"the authority itself ends on {authority.root.not_after:%Y-%m-%d}: choose fewer --days for {name}"
            raise ConfigError(text, about="--days")
        return end

    def _add(self, writer: record.RecordWriter, name: str, key_id: str, der: bytes, purpose: record.Purpose) -> None:
        certificate = load(der)
        writer.add(
            record.CertificateIssued(
                at=self.clock(),
                name=name,
                serial=f"{certificate.serial_number:x}",
                key=key_id,
                not_before=certificate.not_valid_before_utc,
                not_after=certificate.not_valid_after_utc,
                certificate=base64.b64encode(der).decode(),
                purpose=purpose,
            )
        )

    def revoke(
        self, authority: Authority, which: str, reason: Reason, list_days: int
    ) -> tuple[record.CertificateIssued, ...]:
        """Revoke a device's certificates, or the one with a hex serial, and sign a new list (``sign_list``). Returns
        those that were not revoked before; the list is signed anyway. Raises ConfigError: there is no such certificate;
        TrustError: the list would be too long for its readers, and nothing is revoked."""
        with self._writing() as writer:
            issued, serial = issued_in(writer.events), which.lower().replace(":", "").removeprefix("0x")
            matching = [each for each in issued if each.name == which]
            matching = matching or [each for each in issued if each.serial == serial]
            if not matching:
                text = f"there is no certificate with the name or serial {which}: 'edgeadapt authority list' shows all"
                raise ConfigError(text, about="certificate")
            before = revoked_in(writer.events)
            new = tuple(each for each in matching if each.serial not in before)
            lines = [record.CertificateRevoked(at=self.clock(), serial=each.serial, reason=reason) for each in new]
            self._sign_list(writer, authority, list_days, lines)
        return new

    def sign_list(self, authority: Authority, days: int) -> int:
        """Sign a revocation list (``listed_revocations``), valid for ``days``; return its number."""
        with self._writing() as writer:
            return self._sign_list(writer, authority, days)

    def _sign_list(
        self,
        writer: record.RecordWriter,
        authority: Authority,
        days: int,
        new: Sequence[record.CertificateRevoked] = (),
    ) -> int:
        now = self.clock()
        number = count_lists(writer.events) + 1
        listed = listed_revocations([*writer.events, *new], now)
        revoked = {int(serial, 16): Revocation(each.at, each.reason) for serial, each in listed.items()}
        signed = authority.revocations(number, revoked, now, now + timedelta(days))
        # Before the record has a line: a list that nobody reads would be the last.
        self.root.revocations(signed.to_pem())
        # First the record: a kill in between leaves a number without a list, and no number with two lists.
        for each in new:
            writer.add(each)
        writer.add(record.ListSigned(at=now, number=number, next_update=signed.next_update))
        storage.replace(self.folder / REVOKED, signed.to_pem(), PUBLIC)
        return number

    def certificates(self) -> tuple[tuple[record.CertificateIssued, str], ...]:
        """Return every certificate, in order, with its status: valid, expired, or revoked with the reason."""
        events, now = self._record().read(), self.clock()
        revoked = revoked_in(events)

        def status(each: record.CertificateIssued) -> str:
            if each.serial in revoked:
                return f"revoked ({revoked[each.serial].reason.value})"
            return "valid" if now <= each.not_after else "expired"

        return tuple((each, status(each)) for each in issued_in(events))

    @contextmanager
    def _writing(self) -> Iterator[record.RecordWriter]:
        with self._record().writing() as writer:
            self._require_complete(writer.events)
            yield writer

    def _require_complete(self, events: Sequence[record.Event]) -> None:
        try:
            newest = self.root.revocations(self._read(REVOKED))
        except (ConfigError, TrustError):  # missing or damaged: the next list replaces it
            return
        recorded = {int(serial, 16) for serial in revoked_in(events)}
        if newest.number > count_lists(events) or newest.revoked.keys() - recorded:
            text = f"{self.folder / RECORD} lacks lines that {REVOKED} depends on: restore it from a backup"
            raise DataError(text, about=RECORD)

    def _record(self) -> record.AuthorityRecord:
        self._read(RECORD)
        return record.AuthorityRecord(self.folder / RECORD)

    def _read(self, name: str) -> bytes:
        try:
            return storage.read(self.folder / name, LIMITS[name])
        except (FileNotFoundError, NotADirectoryError):
            text = f"{self.folder} is not an authority's folder: it has no {name}"
            raise ConfigError(text, about=name) from None


def require_new(writer: record.RecordWriter, name: str, key: PublicKey, now: datetime) -> None:
    """Check that a key may be certified under a name: neither is another device's, and neither was revoked."""
    revoked, key_id = revoked_in(writer.events), key.key_id
    for issued in issued_in(writer.events):
        if issued.purpose is not record.Purpose.IDENTITY:
            continue
        if issued.key == key_id and issued.serial in revoked:
            text = f"the key {key_id} was revoked: generate a new one on the device"
            raise ConfigError(text, about="key.revoked")
        if issued.key == key_id and issued.name != name:
            text = f"the key {key_id} is that of {issued.name}: generate a new one on {name}"
            raise ConfigError(text, about="key.name")
        if issued.name != name and same_name(issued.name) == same_name(name):
            text = f"{name} differs from {issued.name} in upper and lower case only: choose another name"
            raise ConfigError(text, about="name.case")
        if issued.name == name and issued.key != key_id and issued.serial not in revoked and now <= issued.not_after:
            text = f"{name} has a valid certificate with another key ({issued.key}): revoke it first"
            raise ConfigError(text, about="name.key")


def require_unrevoked(events: Sequence[record.Event], name: str, serial: int) -> None:
    """Check that the certificate with a serial, which a device presents, was not revoked."""
    if f"{serial:x}" in revoked_in(events):
        raise TrustError(f"a certificate of {name} was revoked: {ENROL_AGAIN}", about="renewal.revoked")


def require_redeemable(events: Sequence[record.Event], token: str, name: str, key_id: str, now: datetime) -> None:
    """Check that an invitation is for this name, and was not used for another key. The TrustError does not say whether
    such an invitation exists."""
    invited = [event for event in events if isinstance(event, record.InvitationIssued) and event.token == token]
    used = [event.key for event in events if isinstance(event, record.InvitationUsed) and event.token == token]
    if not invited or (used and used[0] != key_id) or (not used and now > invited[0].expires):
        raise TrustError(NOT_REDEEMABLE, about="invitation")
    if name != invited[0].name:
        text = f"the invitation is for {invited[0].name}, and the request for {name}"
        raise TrustError(text, about="invitation.name")


def certificate_of(events: Sequence[record.Event], key_id: str) -> bytes | None:
    """Return the certificate of a key, if it has one that is not revoked."""
    revoked = revoked_in(events)
    valid = [each for each in issued_in(events) if each.key == key_id and each.serial not in revoked]
    return base64.b64decode(valid[-1].certificate) if valid else None


def lasting_certificate_of(
    events: Sequence[record.Event], name: str, key_id: str, now: datetime, end: datetime
) -> bytes | None:
    """Return the certificate of a device's key, DER, if it does not end soon, or no sooner than a new one, at ``end``.
    So an answer that did not arrive is given once more, and the record does not grow, however often a device asks."""
    revoked = revoked_in(events)
    for certificate in issued_in(events):
        if (certificate.name, certificate.key) != (name, key_id) or certificate.serial in revoked:
            continue
        left, whole = certificate.not_after - now, certificate.not_after - certificate.not_before
        if certificate.not_after >= end or left >= RENEWABLE * whole:
            return base64.b64decode(certificate.certificate)
    return None


def issued_in(events: Sequence[record.Event]) -> list[record.CertificateIssued]:
    return [event for event in events if isinstance(event, record.CertificateIssued)]


def revoked_in(events: Sequence[record.Event]) -> dict[str, record.CertificateRevoked]:
    return {event.serial: event for event in events if isinstance(event, record.CertificateRevoked)}


def listed_revocations(events: Sequence[record.Event], now: datetime) -> dict[str, record.CertificateRevoked]:
    """Return the revocations that a list signed now has, by serial number.

    The revocation of an expired certificate is on one more list, which was signed after that, and then on none (RFC
    5280, section 3.3): lists stay as short as the fleet is large. That list is signed a day later at least. By the
    clock of who accepts a list (``RevocationList.require_fresh``), what it lacks has expired as well. A list with a
    later time than ``now`` was signed by a clock that ran ahead, and shows nothing."""
    ends = {each.serial: each.not_after for each in issued_in(events)}
    listed = dict[str, record.CertificateRevoked]()
    for event in events:
        if isinstance(event, record.CertificateRevoked):
            listed[event.serial] = event
        elif isinstance(event, record.ListSigned) and event.at <= now:
            until = event.at - AHEAD
            listed = {serial: each for serial, each in listed.items() if serial not in ends or until <= ends[serial]}
    return listed


def count_lists(events: Sequence[record.Event]) -> int:
    return sum(isinstance(event, record.ListSigned) for event in events)
