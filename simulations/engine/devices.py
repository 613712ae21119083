"""The devices of a simulation: the state of each is kept in memory between messages, where the field has files.

Before each session and round, and at the end, a device's state directory gets what its training depends on (the parts
of the adapter that it does not share, and before a session its seed) and its privacy ledger. So a run that goes on at
the first round of a session makes the same adapters. What a device holds against a coordinator that lies is not
written. The resumed run begins with another session, as after a restart in the field, so a kill loses the round under
way. A device that is not asked when a session begins leaves the previous session, which takes the most memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation import sealedstate
from aggregation.client import Device
from aggregation.errors import TrustError
from aggregation.masks import KEY, derive
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.sealedstate import ClientState
from aggregation.steps import Step
from client.node.app import STATE, OpenState, register
from client.node.policy import EligibilitySettings
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts
from client.node.snapshot import Snapshot
from client.node.statedir import SNAPSHOT, DeviceStateDir, R, Record
from client.node.sumhistory import SumHistory
from client.training.engine import trainer_of
from client.training.examples import Example, Score
from client.training.trainer import FrozenBase, Trainer
from edgeadapt.formats import storage
from edgeadapt.formats.layout import Tensors
from edgeadapt.rounds.task import Task
from simulations.engine.plain import PlainDevice
from simulations.scenario import Scenario

FACTORS = {"sign-flip": -1.0, "label-flip": 1.0, "boost": 10.0}  # of what the attacker trains
SEED = "simulation.seed"  # file
WRITTEN_BEFORE = (Step.CHECK_IN, Step.PLAN)  # a session and a round begin


class LyingTrainer(Trainer):
    """Lies: its update is not that of the examples. Its scores are honest: a false one shows in the sum's metrics.

    ``sign-flip``: the negative of the update. ``label-flip``: trained with each label replaced by its mirror image, the
    first by the last and so on (Tolpegin et al. 2020). ``boost``: ten times that (Bagdasaryan et al. 2020); the device
    clips it, as the sum would count as zero otherwise."""

    def __init__(self, trainer: Trainer, kind: str) -> None:
        super().__init__(trainer.engine)
        self.trainer, self.kind = trainer, kind

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        return self.trainer.score(adapter, examples)

    def train(self, start: Tensors, examples: Sequence[Example], task: Task, **how: Any) -> Tensors:
        if self.kind != "sign-flip":
            examples = [replace(each, label=len(task.labels) - 1 - each.label) for each in examples]
        trained, factor = self.trainer.train(start, examples, task, **how), np.float32(FACTORS[self.kind])
        return {name: start.get(name, 0) + factor * (after - start.get(name, 0)) for name, after in trained.items()}


def attackers(scenario: Scenario, devices: Iterable[str]) -> frozenset[str]:
    """Choose the devices that lie, by the scenario's seed: its share of them, rounded, at least one."""
    if scenario.attack.kind == "none":
        return frozenset()
    names = sorted(devices)
    number = max(1, round(scenario.attack.share * len(names)))
    chosen = np.random.default_rng([scenario.seed, *b"attackers"]).choice(names, size=number, replace=False)
    return frozenset(map(str, chosen))


class LyingApp(ClientApp):
    """Runs the devices' app, in which those lie whose ``STATE`` is one of ``names``."""

    def __init__(self, kind: str, names: frozenset[str], open_state: OpenState) -> None:
        super().__init__()
        self._names, self._attacker = names, ClientApp()
        register(self, open_state)
        register(self._attacker, open_state, lambda *given: LyingTrainer(trainer_of(*given), kind))

    def __call__(self, message: Message, context: Context) -> Message:
        if context.node_config[STATE] in self._names:
            return self._attacker(message, context)
        return super().__call__(message, context)


class SeededEntropy:
    """Draws from a chain of keys: a draw takes at most 32 bytes, and replaces the key by its successor."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def bytes(self, n: int) -> bytes:
        drawn = derive(self.key, b"edgeadapt/session-training/1")
        self.key = derive(self.key, b"edgeadapt/next-training/1")
        return drawn[:n]


class MemoryDevice(DeviceStateDir):
    """Keeps a device in memory. What a file of the directory ``files`` gives is read once. ``plain``: it masks nothing.
    ``bases``: its base, and the one to which its coordinator migrates, if it has that."""

    eligibility, last_round = EligibilitySettings(), None  # a simulated device always takes part
    _first: Device | None = None  # on its own base; None: it is to be read

    def __init__(self, files: DeviceStateDir, *bases: FrozenBase, plain: bool = False) -> None:
        super().__init__(files.folder, files.settings)
        self._plain = plain
        self._bases = {base.digest: base for base in bases}
        self._reopen()
        self._entropy = SeededEntropy((files.folder / SEED).read_bytes())
        parts, ledger = super().load(PrivateParts), super().load(PrivacyLedger)
        # The key protects from a coordinator that lies. Without masks, one for all saves a sketch for each.
        history = SumHistory(bytes(KEY)) if plain else None
        self._kept: dict[type[Any], Any] = {type(kept): kept for kept in (parts, ledger, history) if kept is not None}
        self._written = self._entropy.key, parts, ledger
        self._state: ClientState | None = None
        self._snapshot: tuple[bytes, Snapshot] | None = None

    @property
    def identity(self) -> IdentityKey:
        return self._first.identity if self._first else super().identity

    @property
    def certificate(self) -> bytes:
        return self._first.certificate if self._first else super().certificate

    @property
    def coordinator(self) -> PublicKey:
        return self._first.coordinator if self._first else super().coordinator

    def base(self, digest: str = "") -> FrozenBase:
        return self._bases.get(digest) or next(iter(self._bases.values()))

    def device(self, base_digest: str) -> Device:
        return self._devices[base_digest]

    def root(self) -> Root:
        return self._first.root if self._first else super().root()

    def revoke(self, raw: bytes) -> None:
        super().revoke(raw)
        self._reopen()

    def _reopen(self) -> None:
        self._first = None
        devices = {digest: super(MemoryDevice, self).device(digest) for digest in self._bases}
        self._devices = {name: PlainDevice.of(each) if self._plain else each for name, each in devices.items()}
        self._first = next(iter(self._devices.values()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock nothing: the devices of a simulation answer one after the other."""
        yield

    def load_state(self) -> ClientState | None:
        return sealedstate.reopened(self._state) if self._state else None

    def save_state(self, state: ClientState) -> None:
        self._state = state

    def take_snapshot(self, examples: bytes, share_key: bytes) -> None:
        self.save_snapshot(Snapshot(self._entropy.bytes(KEY), examples), share_key)

    def save_snapshot(self, snapshot: Snapshot, share_key: bytes) -> None:
        self._snapshot = share_key, snapshot

    def load_snapshot(self, share_key: bytes) -> Snapshot:
        if self._snapshot is None or self._snapshot[0] != share_key:
            text = f"{self.folder} has no snapshot of this session: this device takes part from the next one on"
            raise TrustError(text, about=SNAPSHOT)
        return self._snapshot[1]

    def delete_snapshot(self) -> None:
        self._snapshot = None

    def states(self) -> None:
        """All devices of a process share one cache."""

    def load(self, kind: type[R]) -> R | None:
        return self._kept.get(kind)

    def save(self, record: Record) -> None:
        self._kept[type(record)] = record

    def delete(self, kind: type[Record]) -> None:
        self._kept.pop(kind, None)

    def leave(self) -> None:
        self._state = self._snapshot = None

    def write(self, step: Step | None) -> None:
        """Write what the state directory does not have yet, before a message of ``step``, or all at the end (None)."""
        key, parts, ledger = self._written
        end = step is None
        if self._entropy.key != key and step is not Step.PLAN:
            storage.replace(self.folder / SEED, self._entropy.key)
            key = self._entropy.key
        now, spent = self.load(PrivacyLedger), ledger or PrivacyLedger()
        if (own := self.load(PrivateParts)) is not parts and own is not None:
            super().save(own)
        if now is not None and (now.spent != spent.spent or (end and now != spent)):
            super().save(now)
            ledger = now
        self._written = key, own, ledger


@dataclass(slots=True)
class MemoryDevices:
    """Keeps the devices of a run, by the name that ``STATE`` has in the configuration of their nodes."""

    state_dir: Callable[[str], DeviceStateDir]  # name → the device's state directory, which is made if it is missing
    base: FrozenBase
    plain: bool = False
    next_base: FrozenBase | None = None
    _awake: dict[str, MemoryDevice] = field(default_factory=dict)

    def open(self, context: Context) -> MemoryDevice:
        name = str(context.node_config[STATE])
        if name not in self._awake:
            bases = (self.base, self.next_base) if self.next_base else (self.base,)
            self._awake[name] = MemoryDevice(self.state_dir(name), *bases, plain=self.plain)
        return self._awake[name]

    def before(self, step: Step | None, names: Sequence[str]) -> None:
        """Prepare for a message of ``step`` to the devices ``names``: see the module."""
        if step in WRITTEN_BEFORE:
            self.write(step)
        if step is Step.CHECK_IN:
            for name in self._awake.keys() - set(names):
                self._awake[name].leave()

    def write(self, step: Step | None = None) -> None:
        for device in self._awake.values():
            device.write(step)
