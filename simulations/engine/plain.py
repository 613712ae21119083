"""Rounds without masks, for simulations: what cancels in a sum is not computed.

Masks cancel, and neither a share nor a signature changes a number, so a run makes the adapters, records and accounts
that it would make with the protocol, bit for bit. The parties here put zeros of the same length in place of keys,
shares, keystreams and signatures; all else is real. There is no transcript to audit. No device and no coordinator
outside of ``simulations`` has such parties (tests/architecture/test_sources.py)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from aggregation.client import Advertised, Device, Planned
from aggregation.entropy import Entropy
from aggregation.masks import KEY, Mask
from aggregation.messages import AEAD_TAG, PAIR, SHARE_DIGEST, EncryptedShares, Plan, UnmaskResponse
from aggregation.pki import Root
from aggregation.pki.identity import SIGNATURE, IdentityKey, PublicKey
from aggregation.pki.revocation import RevocationList
from aggregation.recovery import Recovery
from aggregation.ring import Ring
from aggregation.server import Coordinator
from aggregation.session import Session
from aggregation.shamir import SHARE
from aggregation.sharing import Secrets, SharePair
from aggregation.steps import Step
from aggregation.transcript.entries import MAGIC, Entry, read
from aggregation.transcript.log import NO_SESSION, Transcript
from aggregation.transcript.logstate import LogState
from coordinator.statedir import CoordinatorStateDir
from coordinator.transcripts import Recorder, Transcripts
from edgeadapt.auditing.transcripts import log_name, log_number, logs
from edgeadapt.formats import storage
from edgeadapt.formats.registryfiles import SUMS

_NO_SHARES = SharePair(bytes(SHARE), bytes(SHARE))


class UncheckedKey(PublicKey):
    __slots__ = ()

    def verify(self, tag: str, body: bytes, signature: bytes) -> None: ...


class UnsignedKey(IdentityKey):
    __slots__ = ()

    @property
    def public(self) -> PublicKey:
        return UncheckedKey(super().public.raw)

    def sign(self, tag: str, body: bytes) -> bytes:
        return bytes(SIGNATURE)


class PlainRoot(Root):
    __slots__ = ()

    def verify(self, der: bytes, at: datetime | None = None) -> tuple[str, PublicKey]:
        device, key = super().verify(der, at)
        return device, _unchecked(key)


@lru_cache(maxsize=2**14)
def _unchecked(key: PublicKey) -> UncheckedKey:
    return UncheckedKey(key.raw)


class PlainDevice(Device):
    """A device that masks nothing, and knows of a log no more than its session."""

    __slots__ = ()

    @classmethod
    def of(cls, device: Device) -> "PlainDevice":
        return cls(
            UnsignedKey(device.identity.raw),
            device.certificate,
            PlainRoot(device.root.der, device.root.revoked),
            UncheckedKey(device.coordinator.raw),
            device.policy,
        )

    def public_key(self, private: bytes) -> bytes:
        return private[:-1] + b"\x01"  # in the canonical form, and not of small order

    def deal(
        self, session: Session, me: str, share_key: bytes, secrets: Mapping[int, Secrets], entropy: Entropy
    ) -> tuple[dict[int, SharePair], dict[str, EncryptedShares]]:
        dealt = dict.fromkeys(session.neighbors(me, session.peers), _as_long_as_shares(session.spec.rounds))
        return dict.fromkeys(secrets, _NO_SHARES), dealt

    def decrypt(
        self, session: Session, me: str, share_key: bytes, dealt: Mapping[str, EncryptedShares]
    ) -> Iterator[tuple[str, Mapping[int, SharePair]]]:
        return ((dealer, dict.fromkeys(range(1, session.spec.rounds + 1), _NO_SHARES)) for dealer in dealt)

    def mask(self, vector: Ring, planned: Planned, threads: int) -> None: ...

    def log_state_of(
        self, joined: Advertised, known: LogState | None, proof: bytes, *, other_base: bool = False
    ) -> LogState:
        if known is not None:
            known.require_new(joined.offer)
        return LogState(joined.me, joined.offer, NO_SESSION, 0, "")

    def followed(self, known: LogState, receipt: bytes, plan: Plan) -> LogState:
        return known


@lru_cache
def _as_long_as_shares(rounds: int) -> EncryptedShares:
    return EncryptedShares(bytes(rounds * (PAIR + 2 * SHARE_DIGEST) + AEAD_TAG), ())


class PlainCoordinator(Coordinator):
    """Takes the sum as it is, if enough devices answered to unmask it."""

    __slots__ = ()

    def accepts(self, shares: Mapping[str, EncryptedShares], rounds: int) -> bool:
        return True

    def recovery(
        self,
        session: Session,
        plan: Plan,
        dealt: Mapping[str, Mapping[str, EncryptedShares]],
        responses: Mapping[str, UnmaskResponse],
        corrupt: int | None,
    ) -> Recovery:
        return _PlainRecovery(session, plan, dealt, responses, corrupt)

    def unmask(self, total: Ring, remove: Iterable[Mask], threads: int) -> None: ...


class _PlainRecovery(Recovery):
    __slots__ = ()

    def _reconstruct(
        self, dealer: str, kind: int, shares: Mapping[str, bytes], matches: Callable[[bytes], bool]
    ) -> bytes | None:
        if len(shares) < self.session.spec.threshold:
            return super()._reconstruct(dealer, kind, shares, matches)
        return bytes(KEY)


class _Sums(Recorder):
    """Writes of a session what a run needs that goes on: the offer, each plan, and the survivors that were named."""

    __slots__ = ()

    def sent(self, step: Step, bodies: Mapping[str, bytes]) -> None:
        if bodies and step is not Step.ROSTER:
            device, body = next(iter(bodies.items()))
            self.write(self.log.sent(step, {device: body}, self.now()))

    def received(self, step: Step, device: str, body: bytes) -> None: ...

    def receipts(self, devices: Iterable[str]) -> dict[str, bytes]:
        return dict.fromkeys(devices, b"")

    def write(self, records: bytes, *, sync: bool = False) -> None:
        super().write(records)


class _SumsOfRun(Transcripts):
    """Keeps the ``_Sums`` of all sessions. A last record that a kill left incomplete is not read."""

    __slots__ = ()

    def begin(self, offer: bytes, revoked: RevocationList | None = None) -> Recorder:
        number = max(map(log_number, logs(self.folder)), default=0) + 1
        recorder = _Sums(self.folder / log_name(number), Transcript(offer, self.head().newest), self.key)
        recorder.write(MAGIC)
        return recorder

    def sessions(self, *, backwards: bool = False) -> Iterator[tuple[Entry, ...]]:
        paths = logs(self.folder)
        for path in reversed(paths) if backwards else paths:
            yield read(storage.read(path)).entries

    def session_chain_proofs(self, recorder: Recorder, last_offers: Mapping[str, bytes]) -> dict[str, bytes]:
        return dict.fromkeys(last_offers, b"")

    def finish(self) -> bytes:
        return NO_SESSION


def is_plain(coordinator: Path) -> bool:
    """Whether the rounds of a coordinator's state directory have no masks."""
    return (coordinator / SUMS).is_dir()


def open_coordinator(folder: Path) -> CoordinatorStateDir:
    """Open the state directory of a simulated coordinator. Raises as ``CoordinatorStateDir.open``."""
    opened = CoordinatorStateDir.open(folder)
    if not is_plain(folder):
        return opened
    key, root = UnsignedKey(opened.key.raw), PlainRoot(opened.root.der)
    sums = _SumsOfRun(folder / SUMS, key, root, False, opened.registry.head)
    return replace(opened, root=root, protocol=PlainCoordinator(key), transcripts=sums)
