"""What the app needs of a device's state: on disk in the field (``statedir``), in memory in a simulation.

The contract of both: an answer leaves only after the new state was saved, and what was saved is what the next message
finds, unless the device was restarted in between. A device that then finds no session takes part in the next one.
"""

from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from aggregation.client import Device
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.sealedstate import ClientState
from aggregation.transcript.logstate import LogState
from client.node.adapterstate import AdapterState
from client.node.eligibility import EligibilitySettings
from client.node.keptstates import StatesFile
from client.node.policy import PolicySettings
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts
from client.node.snapshot import Snapshot
from client.node.sumhistory import SumHistory
from client.node.tasklabels import TaskLabels
from client.training.hygiene import HygieneSettings
from client.training.trainer import FrozenBase

Record = LogState | AdapterState | TaskLabels | SumHistory | PrivateParts | PrivacyLedger
R = TypeVar("R", LogState, AdapterState, TaskLabels, SumHistory, PrivateParts, PrivacyLedger)


class DeviceState(Protocol):
    """The state of one device, opened for one message. ``DeviceStateDir`` documents each method."""

    @property
    def policy(self) -> PolicySettings: ...

    @property
    def eligibility(self) -> EligibilitySettings: ...

    @property
    def data(self) -> HygieneSettings | None: ...

    def corrections(self) -> bytes: ...

    @property
    def last_round(self) -> datetime | None: ...

    @property
    def examples(self) -> Path: ...

    @property
    def identity(self) -> IdentityKey: ...

    @property
    def certificate(self) -> bytes: ...

    @property
    def coordinator(self) -> PublicKey: ...

    def base(self, digest: str = "") -> FrozenBase: ...

    def device(self, base_digest: str) -> Device: ...

    def root(self) -> Root: ...

    def revoke(self, raw: bytes) -> None: ...

    def locked(self) -> AbstractContextManager[None]: ...

    def load_state(self) -> ClientState | None: ...

    def save_state(self, state: ClientState) -> None: ...

    def take_snapshot(self, examples: bytes, share_key: bytes) -> None: ...  # with what it counted of its answers

    def save_snapshot(self, snapshot: Snapshot, share_key: bytes) -> None: ...

    def load_snapshot(self, share_key: bytes) -> Snapshot: ...

    def delete_snapshot(self) -> None: ...

    def states(self) -> StatesFile | None: ...  # None: it keeps no states of its texts

    def load(self, kind: type[R]) -> R | None: ...

    def save(self, record: Record) -> None: ...

    def delete(self, kind: type[Record]) -> None: ...
