"""The devices of a simulation: the state of each is kept in memory between messages, where the field has files.

Before each session and round, and at the end, a device's state directory gets what its training depends on: its
seed, and the parts of the adapter that it does not share; and its privacy ledger, if it has spent any privacy.
How many contributions had no noise is written at the end only, because nothing depends on it.
What a device holds against a coordinator that lies is not written: the state of its session, and what it knows of the
log, the adapter and the sums. After a kill it is as a new device in this respect. The resumed run begins with another
session, as after a restart of the coordinator in the field, so that a kill loses the round under way.

A state directory is made when its device gets its first message. A device that is not asked at the begin of a session
leaves the session before, which takes the most memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context

from adapters.storage import replace
from aggregation import sealed
from aggregation.client import Device
from aggregation.errors import TrustError
from aggregation.masks import KEY
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.sealed import ClientState
from aggregation.steps import Step
from client.node.app import STATE
from client.node.devicestate import R, Record
from client.node.eligibility import EligibilitySettings
from client.node.policy import PolicySettings
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts
from client.node.snapshot import Snapshot
from client.node.statedir import SNAPSHOT, DeviceStateDir
from client.training.trainer import FrozenBase
from simulations.engine.seeded import SEED, SeededEntropy

WRITTEN_BEFORE = (Step.CHECK_IN, Step.PLAN)  # a session and a round begin


class MemoryDevice:
    """A ``DeviceState`` in memory. What a file gives is read once."""

    def __init__(self, files: DeviceStateDir, base: FrozenBase) -> None:
        self._files, self._base = files, base
        self.policy: PolicySettings = files.policy
        self.eligibility, self.last_round = EligibilitySettings(), None  # a simulated device always takes part
        self.examples: Path = files.examples
        self.identity: IdentityKey = files.identity
        self.certificate: bytes = files.certificate
        self.coordinator: PublicKey = files.coordinator
        self._root = files.root()
        self._device = files.device(base.digest)
        self._entropy = SeededEntropy((files.folder / SEED).read_bytes())
        parts, ledger = files.load(PrivateParts), files.load(PrivacyLedger)
        self._kept: dict[type[Any], Any] = {type(kept): kept for kept in (parts, ledger) if kept is not None}
        self._written = self._entropy.key, parts, ledger
        self._state: ClientState | None = None
        self._snapshot: tuple[bytes, Snapshot] | None = None

    def base(self) -> FrozenBase:
        return self._base

    def device(self, base_digest: str) -> Device:
        """See ``DeviceStateDir``. ``base_digest`` is that of ``base``."""
        return self._device

    def root(self) -> Root:
        return self._root

    def revoke(self, raw: bytes) -> None:
        self._files.revoke(raw)
        self._root, self._device = self._files.root(), self._files.device(self._base.digest)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nothing to lock: the devices of a simulation answer one after the other."""
        yield

    def load_state(self) -> ClientState | None:
        return sealed.reopened(self._state) if self._state else None

    def save_state(self, state: ClientState) -> None:
        self._state = state

    def take_snapshot(self, examples: bytes, share_key: bytes) -> None:
        self.save_snapshot(Snapshot(self._entropy.bytes(KEY), examples), share_key)

    def save_snapshot(self, snapshot: Snapshot, share_key: bytes) -> None:
        self._snapshot = share_key, snapshot

    def load_snapshot(self, share_key: bytes) -> Snapshot:
        if self._snapshot is None or self._snapshot[0] != share_key:
            text = f"{self._files.folder} has no snapshot of this session: this device takes part from the next one on"
            raise TrustError(text, about=SNAPSHOT)
        return self._snapshot[1]

    def delete_snapshot(self) -> None:
        self._snapshot = None

    def load(self, kind: type[R]) -> R | None:
        return self._kept.get(kind)

    def save(self, record: Record) -> None:
        self._kept[type(record)] = record

    def delete(self, kind: type[Record]) -> None:
        self._kept.pop(kind, None)

    def leave(self) -> None:
        self._state = self._snapshot = None

    def write(self, *, end: bool) -> None:
        """Write what the state directory does not have yet: what training depends on, and at the end everything."""
        key, parts, ledger = self._written
        if self._entropy.key != key:
            replace(self._files.folder / SEED, self._entropy.key)
        now, spent = self.load(PrivacyLedger), ledger or PrivacyLedger()
        if (own := self.load(PrivateParts)) is not parts and own is not None:
            self._files.save(own)
        if now is not None and (now.spent != spent.spent or (end and now != spent)):
            self._files.save(now)
            ledger = now
        self._written = self._entropy.key, own, ledger


@dataclass(slots=True)
class MemoryDevices:
    """The devices of a run, by the name that ``STATE`` has in the configuration of their nodes.

    Args:
        state_dir: Name → the device's state directory, which is made if it is missing.
        base: Of all of them.
    """

    state_dir: Callable[[str], DeviceStateDir]
    base: FrozenBase
    _awake: dict[str, MemoryDevice] = field(default_factory=dict)

    def open(self, context: Context) -> MemoryDevice:
        name = str(context.node_config[STATE])
        if name not in self._awake:
            self._awake[name] = MemoryDevice(self.state_dir(name), self.base)
        return self._awake[name]

    def before(self, step: Step | None, names: Sequence[str]) -> None:
        """Prepare for a message of ``step`` to the devices ``names``: see the module."""
        if step in WRITTEN_BEFORE:
            self._write(end=False)
        if step is Step.CHECK_IN:
            for name in self._awake.keys() - set(names):
                self._awake[name].leave()

    def write(self) -> None:
        """Write what each device has to keep, at the end."""
        self._write(end=True)

    def _write(self, *, end: bool) -> None:
        for device in self._awake.values():
            device.write(end=end)
