"""The authority's folder, and what is done with it. Keep it off the coordinator's machine, and offline.

    authority.key   the private key, PKCS #8, under a passphrase; readable by its owner only
    authority.pem   the certificate that devices and coordinator pin
    revoked.crl     the newest revocation list, to be handed to the coordinator
    record.jsonl    every certificate, revocation and list (``record``)

A private key is read where it signs and nowhere else. Whoever has it can enrol devices without limit.
"""

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509

from adapters import storage
from adapters.storage import PRIVATE, PUBLIC
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError, of_file
from aggregation.pki import Authority, Root
from aggregation.pki.certificates import require_device_id
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.revocation import Reason, Revocation
from coordinator.authority.record import AuthorityRecord, Issued, Listed, RecordWriter, Revoked

KEY, CERTIFICATE, REVOKED, RECORD = "authority.key", "authority.pem", "revoked.crl", "record.jsonl"
SHORTEST = 12  # characters of a passphrase: PKCS #8 as OpenSSL writes it tries a guess in a millisecond
SKEW = timedelta(hours=1)  # by which a device's clock may be behind


@dataclass(frozen=True, slots=True)
class AuthorityStore:
    """An authority's folder."""

    folder: Path

    @classmethod
    def found(cls, folder: Path, name: str, days: int, list_days: int, passphrase: bytes | None) -> Self:
        """Make a new authority in ``folder``, with an empty revocation list. All of it is there afterwards, or nothing.

        Args:
            folder: New, or empty.
            name: Of the authority, in its certificate.
            days: How long the authority lasts.
            list_days: How long its first list is good.
            passphrase: Encrypts the key; nothing leaves it unencrypted.

        Raises:
            ConfigError: The folder is not empty or the one that we are in, or the passphrase is too short.
        """
        if passphrase is not None and len(passphrase) < SHORTEST:
            raise ConfigError(f"a passphrase of fewer than {SHORTEST} characters is guessed too soon")
        now = _now()
        authority = Authority.create(name, SystemEntropy(), now - SKEW, now + timedelta(days))
        with storage.new_folder(folder, mode=storage.PRIVATE_FOLDER) as made:
            storage.replace(made / KEY, authority.key.to_pem(passphrase), PRIVATE)
            storage.replace(made / CERTIFICATE, authority.root.to_pem(), PUBLIC)
            storage.replace(made / RECORD, b"", PRIVATE)
            cls(made).sign_list(authority, list_days)
        return cls(folder)

    @property
    def encrypted(self) -> bool:
        """Whether the key takes a passphrase.

        Raises:
            ConfigError: There is no authority here.
        """
        return b"ENCRYPTED" in self._read(KEY)

    @property
    def root(self) -> Root:
        """What devices and coordinator pin.

        Raises:
            ConfigError: There is no authority here.
        """
        with of_file(self.folder / CERTIFICATE):
            return Root.from_pem(self._read(CERTIFICATE))

    def unlock(self, passphrase: bytes | None) -> Authority:
        """The authority with its key.

        Raises:
            TrustError: The passphrase is not the one, or the files are damaged.
        """
        with of_file(self.folder / KEY):
            key = IdentityKey.from_pem(self._read(KEY), passphrase)
        authority = Authority(key, self.root.der)
        if authority.key.public != authority.root.key:
            raise TrustError(f"{self.folder}: key and certificate do not belong together")
        return authority

    def issue(self, authority: Authority, name: str, key: PublicKey, days: int) -> bytes:
        """Certify ``key`` as that of the device ``name``, from now on; DER.

        Raises:
            ConfigError: The certificate would outlast the authority; the key is another device's or was revoked; or the
                name is that of a device with another key.
            DataError: The record is damaged or lacks lines.
        """
        now, name = _now(), require_device_id(name)
        begin, end = now - SKEW, now + timedelta(days)
        if end > authority.root.not_after:
            raise ConfigError(f"the authority itself ends on {authority.root.not_after:%Y-%m-%d}: choose fewer days")
        with self._writing() as pen:
            _require_new(pen, name, key, now)
            serial = x509.random_serial_number()
            der = authority.issue(name, key, not_before=begin, not_after=end, serial=serial)
            pen.add(
                Issued(
                    at=now,
                    name=name,
                    serial=f"{serial:x}",
                    key=key.key_id,
                    not_before=begin,
                    not_after=end,
                    certificate=base64.b64encode(der).decode(),
                )
            )
        return der

    def revoke(self, authority: Authority, which: str, reason: Reason, list_days: int) -> tuple[Issued, ...]:
        """Revoke the certificates of a device, or the one with a serial, and sign a new list with all revocations.

        Args:
            authority: Unlocked.
            which: Name, or serial in hex.
            reason: Goes into the list.
            list_days: How long the list is good.

        Returns:
            What is revoked now and was not before; done again it is none, and the list is signed all the same.

        Raises:
            ConfigError: There is no such certificate.
            DataError: As ``issue``.
        """
        with self._writing() as pen:
            found = [each for each in _issued(pen.events) if each.name == which] or [
                each for each in _issued(pen.events) if each.serial == which.lower().replace(":", "").removeprefix("0x")
            ]
            if not found:
                raise ConfigError(f"no certificate is of the name or serial {which}: 'list' shows them")
            before = _revoked(pen.events)
            new = tuple(each for each in found if each.serial not in before)
            for each in new:
                pen.add(Revoked(at=_now(), serial=each.serial, reason=reason))
            self._sign_list(pen, authority, list_days)
        return new

    def sign_list(self, authority: Authority, days: int) -> int:
        """Sign a revocation list with all revocations so far, good for so many days; its number.

        Raises:
            DataError: As ``issue``.
        """
        with self._writing() as pen:
            return self._sign_list(pen, authority, days)

    def _sign_list(self, pen: RecordWriter, authority: Authority, days: int) -> int:
        now = _now()
        number = _lists(pen.events) + 1
        revoked = {int(serial, 16): Revocation(each.at, each.reason) for serial, each in _revoked(pen.events).items()}
        signed = authority.revocations(number, revoked, now, now + timedelta(days))
        pen.add(Listed(at=now, number=number, until=signed.next_update))  # first: no number is used twice
        storage.replace(self.folder / REVOKED, signed.to_pem(), PUBLIC)
        return number

    def certificates(self) -> tuple[tuple[Issued, str], ...]:
        """Every certificate, in order, and how it stands: ``valid``, ``expired``, or ``revoked`` with the reason."""
        events, now = self._record().read(), _now()
        revoked = _revoked(events)

        def standing(each: Issued) -> str:
            if each.serial in revoked:
                return f"revoked ({revoked[each.serial].reason.value})"
            return "valid" if now <= each.not_after else "expired"

        return tuple((each, standing(each)) for each in _issued(events))

    @contextmanager
    def _writing(self) -> Iterator[RecordWriter]:
        with self._record().writing() as pen:
            self._require_whole(pen.events)
            yield pen

    def _require_whole(self, events: Sequence[object]) -> None:
        """Return if the record knows the list beside it: a list from one that was cut brings revoked devices back."""
        try:
            handed_out = self.root.revocations(self._read(REVOKED))
        except (ConfigError, TrustError):  # not there, or damaged: the next list takes its place
            return
        known = {int(serial, 16) for serial in _revoked(events)}
        if handed_out.number > _lists(events) or handed_out.revoked.keys() - known:
            raise DataError(
                f"{self.folder / RECORD} lacks lines: {REVOKED} beside it says more than it does; take it from a backup"
            )

    def _record(self) -> AuthorityRecord:
        self._read(RECORD)
        return AuthorityRecord(self.folder / RECORD)

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{self.folder} is no authority's folder: it has no {name}") from None


def _require_new(pen: RecordWriter, name: str, key: PublicKey, now: datetime) -> None:
    revoked = _revoked(pen.events)
    for each in _issued(pen.events):
        if each.key == key.key_id and each.serial in revoked:
            raise ConfigError(f"the key {key.key_id} was revoked: the device must make a new one")
        if each.key == key.key_id and each.name != name:
            raise ConfigError(f"the key {key.key_id} is that of {each.name}")
        if each.name == name and each.key != key.key_id and each.serial not in revoked and now <= each.not_after:
            raise ConfigError(f"{name} has a certificate with another key ({each.key}): revoke it first")


def _issued(events: Sequence[object]) -> list[Issued]:
    return [event for event in events if isinstance(event, Issued)]


def _revoked(events: Sequence[object]) -> dict[str, Revoked]:
    return {event.serial: event for event in events if isinstance(event, Revoked)}


def _lists(events: Sequence[object]) -> int:
    return sum(isinstance(event, Listed) for event in events)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)  # X.509 counts in seconds
