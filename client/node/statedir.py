"""A device's state directory: identity, trust anchors, settings, examples and session state.

Every file is readable by its owner only. The state of a session is encrypted at rest, and replaced atomically *before*
an answer leaves the device: a device that restarts never answers a step twice. Log state, adapter state, labels and the
newest revocation list are replaced in the same way; none of them is secret. What a session trains on is encrypted as
well (``snapshot``), and so are the parts of an adapter that are not shared (``privateparts``).

At an enrolment the private key is created here, and never leaves the device. The trust anchors are pinned at the same
time: the authority's certificate and the coordinator's key, as the owner of the device received them."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import tomli_w
from pydantic import ValidationInfo, field_validator

from aggregation import sealedstate
from aggregation.client import Device
from aggregation.entropy import Entropy, SystemEntropy
from aggregation.errors import ConfigError, DataError, ProtocolError, TrustError, of_file
from aggregation.masks import KEY
from aggregation.messages import DIGEST
from aggregation.pki import Root, certificates, requests
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.sealedstate import ClientState
from aggregation.transcript import logstate
from aggregation.transcript.logstate import LogState
from aggregation.wire import Codec
from client.inference.trust import Trust
from client.inference.usage import Usage, UsageDay, today
from client.node.adapterstate import ADAPTER_STATE, AdapterState
from client.node.keptstates import StatesFile
from client.node.policy import EligibilitySettings, PolicySettings
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts
from client.node.snapshot import Snapshot
from client.node.sumhistory import SumHistory
from client.node.tasklabels import TASK_LABELS, TaskLabels, signed_labels
from client.training.corrections import LessonHistory
from client.training.hygiene import HygieneSettings
from client.training.trainer import FrozenBase
from edgeadapt.bases.base import find_base, with_task
from edgeadapt.bases.markedwords import require_marks
from edgeadapt.bases.tasks import CLASSES, CLASSIFICATION, WORDS, find_task
from edgeadapt.formats.bundle import BASE_MANIFEST, TOKENIZER
from edgeadapt.formats.gateway.invitation import ADDRESS, ADDRESSES
from edgeadapt.formats.settings import Settings
from edgeadapt.formats.storage import PRIVATE_FOLDER, locked, new_folder, read, replace

SETTINGS = "device.toml"
AGENT_LOCK = "agent.lock"  # held by an agent, and while its certificate is renewed without one
IDENTITY = "identity.pem"
CERTIFICATE = "certificate.der"
AUTHORITY = "authority.pem"
COORDINATOR = "coordinator.pem"
EXAMPLES = "examples.jsonl"
TRUST = "trust.pem"
PERSONAL = "personal.safetensors"
SEALING_KEY = "sealing.key"
STATE = "session.sealed"
SNAPSHOT = "examples.sealed"
LOG_STATE = "log.state"
ADAPTERS = "adapter.state"
LABELS = "labels.state"
PRIVATE = "private.sealed"
LEDGER = "privacy.sealed"
SUMS = "sums.sealed"
STATES = "states.sealed"
REVOKED = "revoked.crl"
LOCK = "session.lock"
LONGEST = 2**21  # bytes of a file other than those below: a revocation list in PEM form is the largest
LONGEST_STATE = 2**30  # bytes of a session's state, of the examples that it trains on, or of what is known of adapters
LARGE = (STATE, SNAPSHOT, ADAPTERS, PRIVATE, SUMS)
# Kind of record → its file, and its codec; None: it is sealed.
KEPT: Mapping[type[Any], tuple[str, Codec[Any] | None]] = {
    LogState: (LOG_STATE, logstate.LOG_STATE),
    AdapterState: (ADAPTERS, ADAPTER_STATE),
    TaskLabels: (LABELS, TASK_LABELS),
    SumHistory: (SUMS, None),
    PrivateParts: (PRIVATE, None),
    PrivacyLedger: (LEDGER, None),
}

Record = LogState | AdapterState | TaskLabels | SumHistory | PrivateParts | PrivacyLedger
R = TypeVar("R", LogState, AdapterState, TaskLabels, SumHistory, PrivateParts, PrivacyLedger)
Read = TypeVar("Read")
log = logging.getLogger("edgeadapt.device")
REQUEST = "request.csr"


class DeviceSettings(Settings):
    """``device.toml``: the owner's settings. The coordinator cannot change them."""

    base: str
    """frozen base: a folder, a file, an installed package that contains one, or a bundle"""
    next_base: str = ""
    """frozen base on which this device takes part as well, once its coordinator migrates to it; empty: none"""
    task: str = CLASSIFICATION
    """what is learned of labels: classification, words, multilabel, or a task that a package adds"""
    examples: str = EXAMPLES
    """examples file, relative to the state directory"""
    gateway: str = ""
    """HOST:PORT of the coordinator's gateway, for a light device; several with commas, to try in turn"""
    renewal: str = ""
    """HOST:PORT of the authority's service, which renews a light device's certificate; empty: it ends"""
    policy: PolicySettings = PolicySettings()
    eligibility: EligibilitySettings = EligibilitySettings()
    data: HygieneSettings | None = None
    """which examples are kept out of training; without the table, none"""

    @field_validator("gateway", "renewal")
    @classmethod
    def _is_address(cls, value: str, info: ValidationInfo) -> str:
        if value and not re.fullmatch(ADDRESSES if info.field_name == "gateway" else ADDRESS, value):
            raise ValueError(f"{value!r} is not HOST:PORT")
        return value

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read ``device.toml``. Raises as ``Settings.read``, and says how to create a file that is missing."""
        if not path.is_file():
            reason = f"{path.parent} is not a device's state directory: it has no {SETTINGS}"
            raise ConfigError(f"{reason}; create one with 'edgeadapt device enrol'", about=SETTINGS)
        return super().read(path, overrides)


@dataclass(frozen=True)  # a simulation derives a class that has more attributes
class DeviceStateDir:
    """An open state directory. It keeps nothing in memory, unlike a simulation's: open it for every message.

    An answer leaves only after the new state was saved, and what was saved is what the next message finds, unless the
    device was restarted in between. A device that then finds no session takes part in the next one. ``entropy`` draws
    the secret of each session."""

    folder: Path
    settings: DeviceSettings
    entropy: Entropy = field(default_factory=SystemEntropy, repr=False, compare=False)

    @classmethod
    def create(
        cls, folder: Path, settings: DeviceSettings, identity: IdentityKey, trust: Mapping[str, bytes], entropy: Entropy
    ) -> Self:
        """Write a state directory, of ``settings`` only values that differ from their defaults. ``folder``: created if
        it is missing. ``identity``: the device's key; the authority certifies its public key. ``trust``: ``AUTHORITY``,
        ``COORDINATOR`` and, once issued, ``CERTIFICATE`` → the files' bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        toml = tomli_w.dumps(settings.model_dump(mode="json", exclude_defaults=True))
        files = {SETTINGS: toml.encode(), IDENTITY: identity.to_pem(), **trust}
        for name, content in (files | {SEALING_KEY: entropy.bytes(32)}).items():
            replace(folder / name, content)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the settings. Raises as ``DeviceSettings.read``."""
        return cls(folder, DeviceSettings.read(folder / SETTINGS))

    @property
    def eligibility(self) -> EligibilitySettings:
        return self.settings.eligibility

    @property
    def last_round(self) -> datetime | None:
        """When the device trained last, or revealed shares: then it replaces its adapter state. None before."""
        try:
            return datetime.fromtimestamp((self.folder / ADAPTERS).stat().st_mtime, UTC)
        except FileNotFoundError:
            return None

    @property
    def examples(self) -> Path:
        return self.folder / self.settings.examples

    @property
    def certificate(self) -> bytes:
        return self._read(CERTIFICATE)

    @property
    def coordinator(self) -> PublicKey:
        return self._parse(PublicKey.from_pem, COORDINATOR)

    @property
    def identity(self) -> IdentityKey:
        return self._parse(IdentityKey.from_pem, IDENTITY)

    def base(self, digest: str = "") -> FrozenBase:
        """Open the frozen base that the settings name, itself or that of a bundle; the next one, if that has
        ``digest``, and the base itself has not.

        Raises ConfigError, DataError: as ``find_base`` and ``Bundle.base``; or a bundle is not for the task;
        TrustError: no key in ``trust.pem``, next to the bundle, signed its base, or a file was altered."""
        base, following = self._base(self.settings.base), self.settings.next_base
        if not following or digest in ("", base.digest):
            return base
        after = self._base(following)
        return after if after.digest == digest else base

    def _base(self, where: str) -> FrozenBase:
        folder = Path(where)
        if (folder / BASE_MANIFEST).is_file():
            if self.settings.task not in CLASSES:
                reason = f"the task {self.settings.task!r} needs the base itself, and {folder} is a bundle: set base"
                raise ConfigError(reason, about="base")
            base = Trust.open(folder).bundle.base()
            if self.settings.task == WORDS:
                require_marks(base.files[TOKENIZER], "task")
            return base
        return with_task(find_base(where), self.settings.task)

    def device(self, base_digest: str) -> Device:
        """Read identity, trust anchors and policy. Raises TrustError: a key or certificate is missing or damaged."""
        policy = self.settings.policy.policy(base_digest)
        return Device(self.identity, self.certificate, self.root(), self.coordinator, policy)

    def root(self) -> Root:
        """Read the pinned authority, with the newest accepted revocation list. Raises TrustError: one is missing or
        damaged."""
        root = self._parse(Root.from_pem, AUTHORITY)
        return self._parse(root.with_revocations, REVOKED) if (self.folder / REVOKED).exists() else root

    def revoke(self, raw: bytes) -> None:
        """Accept a revocation list, and keep it if it is newer than the previous one. Raises TrustError: the authority
        did not sign the list, or it is older than the previous one."""
        root = self.root()
        new = root.with_revocations(raw).revoked
        if new is not None and new != root.revoked:
            replace(self.folder / REVOKED, new.to_pem())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of this directory. Two processes that read the same state would both answer a step."""
        with locked(self.folder / LOCK):
            yield

    def load_state(self) -> ClientState | None:
        """Load the state of the running session, if any. Raises TrustError: it was altered, or belongs to another
        device."""
        if not (self.folder / STATE).exists():
            return None
        return self._parse(partial(sealedstate.unseal, key=self._read(SEALING_KEY)), STATE)

    def save_state(self, state: ClientState) -> None:
        replace(self.folder / STATE, sealedstate.seal(state, self._read(SEALING_KEY)))

    def take_snapshot(self, examples: bytes, share_key: bytes) -> None:
        """Seal what this device trains on in the session that it joins. ``share_key``: as for ``Snapshot.seal``."""
        self.save_snapshot(Snapshot(self.entropy.bytes(KEY), examples, usage=self._usage()), share_key)

    def _usage(self) -> tuple[UsageDay, ...]:
        """What this device counted of its answers until yesterday; none if its owner contributes none of it."""
        bundle = Path(self.settings.base)
        if not self.settings.policy.observations or not (bundle / BASE_MANIFEST).is_file():
            return ()
        try:
            found = Usage.read(bundle)
        except TrustError as error:
            log.warning("no counts of answers for this session: %s", error, extra={"about": error.about})
            return ()
        return found.before(today()).days if found else ()

    def corrections(self) -> bytes:
        """Read what a person taught next to the bundle that ``[data]`` names, as lines of an examples file. Raises
        ConfigError: there is no bundle, or its labels are not those of this device's rounds; DataError: nothing was
        taught; TrustError: it is damaged, or no pinned key signed the bundle."""
        if not (data := self.settings.data) or not data.corrections:
            return b""
        bundle, remedy = Path(data.corrections), "change [data] corrections in device.toml"
        if not (bundle / BASE_MANIFEST).is_file():
            raise ConfigError(f"{bundle} is not a bundle: {remedy}", about="data.corrections")
        trained = self.load(TaskLabels)
        own = {*signed_labels(self.base())} or ({trained.labels} if trained else set())
        if len(shared := own & {*signed_labels(Trust.open(bundle).bundle.base())}) != 1:
            reason = f"the labels of {bundle} are not those of this device's rounds, or no round was trained yet"
            raise ConfigError(f"{reason}: {remedy}", about="data.corrections")
        if not (taught := LessonHistory.of(bundle).corrections):
            reason = f"nothing was taught next to {bundle}: use 'edgeadapt device learn', or {remedy}"
            raise DataError(reason, about="data.corrections")
        (labels,) = shared
        pairs = [(one.text, one.label) for one in taught]
        rows = [{"text": text, "label": labels.index(name)} for text, name in pairs if name in labels]
        answers = [] if labels else [{"text": answer, "prompt": prompt} for prompt, answer in pairs]
        return "".join(json.dumps(row) + "\n" for row in (*rows, *answers)).encode()

    def save_snapshot(self, snapshot: Snapshot, share_key: bytes) -> None:
        """Seal a snapshot, and replace the old one atomically. ``share_key``: as for ``Snapshot.seal``."""
        replace(self.folder / SNAPSHOT, snapshot.seal(self._read(SEALING_KEY), share_key))

    def load_snapshot(self, share_key: bytes) -> Snapshot:
        """Load what was kept for the session joined with ``share_key``. Raises TrustError: it is missing, altered or
        another's."""
        path = self.folder / SNAPSHOT
        if not path.exists():
            reason = f"{path} is missing: this device takes part again from the next session on"
            raise TrustError(reason, about=SNAPSHOT)
        return self._parse(partial(Snapshot.open, key=self._read(SEALING_KEY), share_key=share_key), SNAPSHOT)

    def delete_snapshot(self) -> None:
        (self.folder / SNAPSHOT).unlink(missing_ok=True)

    def states(self) -> StatesFile | None:
        """Find where the states of texts are kept; None if they are not."""
        return StatesFile(self.folder / STATES, self._read(SEALING_KEY))

    def load(self, kind: type[R]) -> R | None:
        """Load the record of a kind (``KEPT``), None before there is any. Raises TrustError: it is damaged or was
        altered."""
        name, codec = KEPT[kind]
        if not (self.folder / name).exists():
            return None
        if codec is None:
            sealed_kind = cast(Any, kind)
            return cast(R, self._parse(partial(sealed_kind.open, key=self._read(SEALING_KEY)), name))
        try:
            return cast(R, codec.decode(self._read(name)))
        except ProtocolError:
            reason = f"{self.folder / name} is damaged; delete it with 'edgeadapt device forget'"
            raise TrustError(reason, about=name) from None

    def save(self, record: Record) -> None:
        name, codec = KEPT[type(record)]
        raw = record.seal(self._read(SEALING_KEY)) if codec is None else codec.encode(record)  # type: ignore[union-attr]
        replace(self.folder / name, raw)

    def delete(self, kind: type[Record]) -> None:
        (self.folder / KEPT[kind][0]).unlink(missing_ok=True)

    def forget(self) -> None:
        """Leave the session, and delete what this device remembers of the coordinator; its privacy ledger stays."""
        for name in (STATE, SNAPSHOT, LOG_STATE, ADAPTERS, LABELS, SUMS, PRIVATE, STATES):
            (self.folder / name).unlink(missing_ok=True)

    def forget_examples(self) -> None:
        """Delete what was kept and trained of the examples. Parts that were private once stay private."""
        for name in (SNAPSHOT, STATES):
            (self.folder / name).unlink(missing_ok=True)
        if parts := self.load(PrivateParts):
            self.save(PrivateParts(bytes(DIGEST), bytes(DIGEST), b"", b"", parts.ever))

    def _parse(self, parse: Callable[[bytes], Read], name: str) -> Read:
        raw = self._read(name)
        with of_file(self.folder / name):
            return parse(raw)

    def _read(self, name: str) -> bytes:
        try:
            return read(self.folder / name, LONGEST_STATE if name in LARGE else LONGEST)
        except DataError as error:  # a device, a pipe, or too large; no error about examples
            raise TrustError(str(error), about=error.about) from error
        except FileNotFoundError as error:
            reason = f"{self.folder} has no {name}: enrol this device first, with 'edgeadapt device enrol'"
            raise TrustError(reason, about=name) from error


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
    ConfigError: the folder is not empty or is the working directory, the name is not valid, or as ``find_task``."""
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
