"""The signed manifests: of a version in a registry, of an exported base and of an exported adapter; and round records.

Coordinator, exporter and device meet in these documents: frozen values, signed as DSSE envelopes around their JSON.

The record of a round is chained to the previous round's. It says how the round ended and where its ending stands in the
log of its session. The coordinator writes the record first and the ending second, from the record
(``coordinator.transcripts``). So a start after a kill can add the ending that is missing, and a log that lacks an
ending which it once had is recognized."""

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError

from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey, PublicKey
from edgeadapt.formats import dsse, jsontext
from edgeadapt.formats.jsontext import Exact
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.settings import Settings

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]  # what every database has an integer for
Task = Literal["text-classification", "text-generation"]  # as optimum and transformers call them
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # stays inside its folder
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0  # beyond, an adapter is broken rather than badly calibrated
PeftType = Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,64}$")]
RuntimeVersion = Annotated[str, Field(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")]
Temperature = Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, allow_inf_nan=False)]
Format = Literal["fp32", "fp16", "int8", "int4"]  # how an adapter file stores numbers (``quantization.py``)
Line = Annotated[str, Field(pattern=r"^[^\p{C}\p{Z}]([^\p{C}\p{Z}]| )*$", max_length=500)]  # a terminal shows it
License = Annotated[str, Field(pattern=r"^[A-Za-z0-9(][A-Za-z0-9.+() -]*$", max_length=200)]
Language = Annotated[str, Field(pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$", max_length=35)]
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_LABEL = 256  # characters
Time = Annotated[int, Field(ge=0, lt=2**32)]  # seconds since 1970, in UTC
INTERRUPTED = "interrupted"  # why a log aborts a round that was under way when the process ended; it has no record


def check_name(name: str) -> str:
    """Check that an adapter and its two files can have ``name`` on any system, and return it. Raises ConfigError: it is
    empty, longer than 64 characters, or has a character that could leave the folder."""
    if not ADAPTER_NAME.fullmatch(name):
        reason = f"adapter name {name[:80]!r} must be 1 to 64 letters, digits, '.', '_' or '-'"
        raise ConfigError(reason, about="name")
    return name


def check_labels(name: str, labels: Sequence[str]) -> None:
    """Check that a device can answer with the labels of the adapter ``name``. Raises DataError: a label occurs twice,
    or is not a printable name of at most ``MAX_LABEL`` characters."""
    if len(set(labels)) != len(labels):
        raise DataError(f"adapter {name!r} names a label twice: export it again with other labels", about="labels")
    for label in labels:
        if not label.strip() or len(label) > MAX_LABEL or not label.isprintable():
            reason = f"adapter {name!r}: label {label[:40]!r} is not a printable name: export it with another"
            raise DataError(reason, about="labels")


class Manifest(jsontext.Exact):
    """Signs and accepts every manifest. Law: ``accept(manifest.sign(key), [key.public]) == manifest``. A manifest is a
    flat object: a field that is missing, unknown or ill-formed is refused, also if it is signed."""

    __slots__ = ()
    NAME: ClassVar[str]

    @classmethod
    def payload_type(cls) -> str:
        return f"application/vnd.edgeadapt.{cls.NAME}.v1+json"

    def sign(self, key: IdentityKey) -> bytes:
        """Sign the envelope. Equal manifests and keys give equal bytes. Raises DataError: a number is NaN or infinite,
        a text is not Unicode, or the envelope is too large."""
        try:
            payload = jsontext.encode(self._body())
        except (TypeError, ValueError) as error:
            raise DataError(f"the {self.NAME} cannot be signed: {error}", about=self.NAME) from error
        return dsse.sign(payload, self.payload_type(), key)

    def _body(self) -> dict[str, Any]:
        """Return the fields. One that is newer than the format is left out where it says nothing: a PEFT config of all
        layers has none for them, and an adapter without a policy or a card does not name one."""
        body: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        for name in ("policy", "card"):
            if body.get(name, "") is None:
                del body[name]
        if card := body.get("card"):
            body["card"] = dict(card)
        if (config := body.get("peft_config")) and not config["layers_to_transform"]:
            del config["layers_to_transform"]
        return body

    @classmethod
    def accept(cls, raw: bytes, trusted: Iterable[PublicKey]) -> Self:
        """Read the manifest in an envelope that one of the keys ``trusted`` signed. Raises TrustError as
        ``dsse.verify``; or a field is missing, unknown or ill-formed (about ``NAME.FIELD``)."""
        return cls._of(dsse.verify(raw, cls.payload_type(), trusted))

    @classmethod
    def unverified(cls, raw: bytes) -> Self:
        """Read the manifest in an envelope by any signer, for messages and for files that are about to be replaced.
        Raises as ``accept``, apart from the signature."""
        return cls._of(dsse.unverified(raw, cls.payload_type()))

    @classmethod
    def _of(cls, payload: bytes) -> Self:
        try:
            jsontext.decode(payload)  # refuses what the next line would read in one of several ways
            return jsontext.decode_as(cls, payload)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise TrustError(f"{cls.NAME}: field {field}: {first['msg']}", about=f"{cls.NAME}.{field}") from error
        except ValueError as error:
            raise TrustError(f"{cls.NAME}: {error}", about=cls.NAME) from error


@dataclass(frozen=True, slots=True)
class ServerRule(jsontext.Exact):
    """Names a rule that made a version, the server optimizer or the combination of groups, with its numbers.
    ``edgeadapt.rounds.optimizer`` and ``edgeadapt.rounds.combination`` have the rules."""

    name: str
    numbers: dict[str, float]


@dataclass(frozen=True, slots=True)
class PrivacyBound(jsontext.Exact):
    """Bounds differential privacy of all sums that made an adapter, for everything that one device contributed.

    >>> print(PrivacyBound(6.071, 1e-6))
    epsilon 6.07 for delta 1e-06
    """

    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)]

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:.2f} for delta {self.delta:g}"


class Card(Settings):
    """Whoever releases an adapter says what it is: ``card.toml``. Nothing proves it but the manifest's signature."""

    owner: Line  # who answers for it
    purpose: Line
    data: Line  # that it was trained on
    license: License  # an SPDX expression
    languages: Annotated[tuple[Language, ...], Field(min_length=1, max_length=100)]  # as BCP 47 writes them

    def __str__(self) -> str:
        return f"{self.owner}: {self.purpose}; data: {self.data}; {self.license}; {', '.join(self.languages)}"


@dataclass(frozen=True, slots=True)
class VersionManifest(Manifest):
    NAME: ClassVar[str] = "version-manifest"

    version: Count  # 0 is the adapter that the vendor ships on day one
    sha256: Sha256  # of the safetensors file
    size: Count  # of that file, bytes
    base_digest: Sha256
    layout_digest: Sha256
    parent: Sha256 | None  # SHA-256 of the file of the version it was made from
    round: Count  # 0 for the seed
    # Digest of that round's plan, in which a log names the round; None for the seed, and for the first on another base,
    # whose ``round`` is the last one before it.
    plan: Sha256 | None
    rule: ServerRule | None  # of the server optimizer, from the sum to this version; None without a plan
    combination: ServerRule | None  # of the means of groups; None where the round had one sum
    survivors: tuple[str, ...]  # devices whose updates are in the sum
    metrics: dict[str, float]  # means over the survivors, as unmasked
    privacy: PrivacyBound | None  # what all sums so far may have revealed of a device; None: nothing bounds it
    peft_config: PeftConfig
    labels: tuple[str, ...]  # the head's rows, in order

    @property
    def id(self) -> tuple[int, str]:
        """Return version and digest of the file: how logs name an adapter."""
        return self.version, self.sha256

    def begins_after(self, before: "VersionManifest") -> bool:
        """Whether it is the first version on another base than ``before``, the version before it. No round made it."""
        unmade = (self.plan, self.rule, self.combination, self.survivors, self.metrics) == (None, None, None, (), {})
        follows = (self.version, self.parent) == (before.version + 1, before.sha256) and self.round >= before.round
        kept = (self.labels, self.privacy) == (before.labels, before.privacy)
        return unmade and follows and kept and self.base_digest != before.base_digest


@dataclass(frozen=True, slots=True)
class BaseManifest(Manifest):
    NAME: ClassVar[str] = "base-manifest"

    base_digest: Sha256
    task: Task
    profile: str
    files: dict[FileName, Sha256]  # name in the base's folder → digest
    slots: dict[str, tuple[str, ...]]  # graph inputs that one adapter fills → symbolic or fixed dimensions, as text
    max_rank: Count  # an adapter with a layer of a higher rank is refused
    independent_rows: bool  # of a classifier: a row of a mixed batch gets the answer that it gets alone
    onnxruntime: RuntimeVersion  # the lowest version that runs the graphs
    opset: Count  # the version of ONNX's operators that the graphs use
    merged: dict[
        Sha256, PeftType
    ]  # adapters that are part of the base: SHA-256 of the file → peft's name of the method


@dataclass(frozen=True, slots=True)
class AdapterManifest(Manifest):
    """Describes an exported adapter: its file, the base that it is for, and the version that it was exported from."""

    NAME: ClassVar[str] = "adapter-manifest"

    name: str  # "global", or the owner's name for a private one
    sha256: Sha256  # of the adapter file
    size: Count  # of that file, bytes
    format: Format
    base_digest: Sha256
    layout_digest: Sha256
    version: Count
    source: Sha256  # of the safetensors file that it was exported from
    peft_config: PeftConfig | None  # gives the scaling that is folded into the file; None if it is not known
    parent: Sha256 | None  # of a private adapter: SHA-256 of the file of the global version it started from
    rank: Count
    labels: tuple[str, ...]
    temperature: (
        Temperature  # divides a classifier's logits (``edgeadapt.formats.calibration``); 1 if it is not calibrated
    )
    privacy: PrivacyBound | None  # of a federation with differential privacy, as of ``VersionManifest``; None: no bound
    policy: Sha256 | None = None  # of the file that says what may be answered (``edgeadapt.formats.policy``)
    card: Card | None = None

    @property
    def content(self) -> str:
        """Hash tensors, scaling, labels, temperature and policy: not name, version, number format, privacy or card."""
        same = {"name": "", "version": 0, "sha256": "", "size": 0, "format": "", "privacy": None}
        return hashlib.sha256(jsontext.encode(replace(self, card=None)._body() | same)).hexdigest()


@dataclass(frozen=True, slots=True)
class GroupRecord(Exact):
    """Describes a group. ``distance``: of its mean from the combination, in weight units."""

    survivors: tuple[str, ...]
    distance: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class RoundRecord(Manifest):
    """Says what happened in one round. Bytes are totals over all devices. A device that drops out after its masked
    input arrived is among the survivors too: its update is in the sum. Raises DataError: a number is not finite, or the
    fields of a result are not all set where the round had one."""

    NAME: ClassVar[str] = "round-record"

    round: Count  # of the federation, from 1
    previous: Sha256 | None  # digest of the previous round's signed record; None for the first
    offer: Sha256  # digest of the session's offer
    plan: Sha256 | None  # digest of the plan; None if the round ended before it had one
    entries: Count  # in the session's log before the ending of the round
    root: Sha256  # of these entries
    survivors: tuple[str, ...]  # devices whose updates are in the sum
    dropped: dict[str, str]  # device that did not finish the round → the step at which it dropped out
    groups: tuple[GroupRecord, ...]  # with a sum of their own each; empty if the round had one sum
    blamed: tuple[str, ...]  # devices found to have dealt or revealed a wrong share
    reason: str | None  # as the log has it, if the round ended without a sum
    aborted: str | None  # the same for people
    spoiled: str | None  # why the sum, or that of a group, counts as zero: honest devices cannot have it
    sum: Sha256 | None  # of the unmasked vector, packed; with groups, of all of them (``aggregation.groups``)
    version: Count | None  # that the round produced
    adapter: Sha256 | None  # of that version's file
    optimizer: Sha256 | None  # of the server optimizer's state after the round; None if it has none
    bytes_up: Count
    bytes_down: Count
    seconds: float  # wall time of the round
    epsilon: float | None  # what all sums so far may have revealed, for the offer's delta; None: nothing bounds it
    metrics: dict[str, float]
    ended: Time | None = None  # as the log of the session tells the time; None in records of earlier versions

    def __post_init__(self) -> None:
        for name, value in {"seconds": self.seconds, "epsilon": self.epsilon or 0.0, **self.metrics}.items():
            if not math.isfinite(value):
                reason = f"round {self.round}: {name!r} is {value}, which no record can hold"
                raise DataError(reason, about=name)
        result = [value is not None for value in (self.version, self.adapter, self.sum)]
        if not all(result if self.aborted is None else [not each for each in result]) or (
            (self.reason is None) != (self.aborted is None)
            or (self.plan is None and self.version is not None)
            or (self.spoiled is not None and self.version is None)
        ):
            raise DataError(
                f"round {self.round} must either be aborted for a reason or have made a version from the sum of a plan",
                about="version",
            )

    def made(self, manifest: VersionManifest) -> bool:
        mine = (self.round, self.plan, self.version, self.adapter, self.survivors)
        return mine == (manifest.round, manifest.plan, manifest.version, manifest.sha256, manifest.survivors)

    def require_agreement(self, manifest: VersionManifest) -> None:
        """Check that the manifest is that of the version which this round produced. Raises DataError."""
        if not self.made(manifest):
            reason = f"the record of round {self.round} and the manifest of its version contradict each other"
            raise DataError(reason, about="record")


def accept_chain(
    rows: Iterable[tuple[int, object]], trusted: Iterable[PublicKey], before: tuple[int, object] = (0, None)
) -> list[RoundRecord]:
    """Verify the records in rows of a registry: each signed, numbered without a gap and naming the previous one.

    ``rows``: number of a round, and its signed record; in order. ``before``: number of the round before these, and its
    signed record; (0, None) before the first. Raises TrustError: a record is missing, was altered, or stands in another
    place than it was signed for."""
    (last, signed), keys, records = before, list(trusted), list[RoundRecord]()
    for number, raw in rows:
        try:
            if not isinstance(raw, bytes):
                raise TrustError("it is not a signed document", about="record")
            record = RoundRecord.accept(raw, keys)
            previous = None if signed is None else digest_of(signed)
            if (record.round, record.round, record.previous) != (number, last + 1, previous):
                raise TrustError("it does not follow the record before it", about="record")
        except (DataError, TrustError) as error:
            text = f"the record of round {number} was altered ({error}): restore the registry from a copy"
            raise TrustError(text, about="record") from None
        records.append(record)
        last, signed = number, raw
    return records


def digest_of(signed: object) -> str:
    """Return the digest by which a record names the previous one (SHA-256, hex). Raises TrustError if it is not bytes,
    as a damaged column of a database may be."""
    if not isinstance(signed, bytes):
        raise TrustError("it is not a signed document", about="record")
    return sha256(signed).hexdigest()
