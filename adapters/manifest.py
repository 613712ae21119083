"""What is said, and signed, about adapters: a registry version, an exported base, an exported adapter.

These three documents are where coordinator, exporter and device meet. Each is a frozen value with one signed form
(``adapters/signed.py``); whoever reads one gets it verified or a ``TrustError``.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from adapters import signed
from adapters.peftconfig import PeftConfig as PeftConfig  # most who read a document ask for its method
from aggregation.errors import TrustError
from aggregation.pki.identity import IdentityKey, PublicKey

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]  # what every database has an integer for
Task = Literal["text-classification", "text-generation"]  # as optimum and transformers call them
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]  # stays inside its folder


class SignedDocument:
    """The signed form that every document below has. ``accept(sign(key), [key.public])`` gives the value back."""

    __slots__ = ()
    KIND: ClassVar[str]

    def sign(self, key: IdentityKey) -> bytes:
        """The canonical signed bytes. Raises as ``signed.sign``."""
        return signed.sign(self.KIND, asdict(self), key)  # type: ignore[call-overload]

    @classmethod
    def accept(cls, raw: bytes, trusted: Iterable[PublicKey]) -> Self:
        """Verify ``raw`` and return the value.

        Raises:
            TrustError: Damaged, unknown signer, wrong signature, or a field that is missing, unknown or ill-formed.
        """
        body = signed.accept(raw, cls.KIND, trusted)
        try:
            return TypeAdapter(cls).validate_json(signed.canonical(body), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise TrustError(f"{cls.KIND}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


@dataclass(frozen=True, slots=True)
class VersionManifest(SignedDocument):
    """One version of the shared adapter in the registry."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    KIND: ClassVar[str] = "edgeadapt/manifest/1"

    version: Count  # 0 is the adapter that the vendor ships on day one
    sha256: Sha256  # of the safetensors blob
    size: Count  # of the blob, bytes
    base_digest: Sha256
    layout_digest: Sha256
    parent: Sha256 | None  # blob digest of the version it was made from
    round: Count  # 0 for the seed
    survivors: tuple[str, ...]  # device names whose updates are in the sum
    metrics: dict[str, float]  # means over the survivors, as unmasked
    method: PeftConfig
    labels: tuple[str, ...]  # the head's rows, in order


@dataclass(frozen=True, slots=True)
class BaseManifest(SignedDocument):
    """An exported base graph: which frozen base it is, for which task, in which profile, and every file's digest."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    KIND: ClassVar[str] = "edgeadapt/base/1"

    base_digest: Sha256
    task: Task
    profile: str
    files: dict[FileName, Sha256]  # name in the folder → digest
    slots: dict[str, tuple[str, ...]]  # graph inputs that one adapter fills → symbolic or fixed dimensions, as text
    max_rank: Count  # an adapter with a layer of a higher rank is refused


@dataclass(frozen=True, slots=True)
class AdapterManifest(SignedDocument):
    """An exported adapter file: what it is, for which base, and where it came from."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    KIND: ClassVar[str] = "edgeadapt/adapter/1"

    name: str  # "global", or the owner's name for a private one
    sha256: Sha256  # of the adapter file
    size: Count  # bytes
    format: Literal["fp32", "fp16", "int8", "int4"]
    base_digest: Sha256
    layout_digest: Sha256
    version: Count
    source: Sha256  # digest of the safetensors blob it was exported from
    method: PeftConfig | None  # how it was made, to undo the folding of the scaling; None if that is not known
    parent: Sha256 | None  # of a private adapter: the blob digest of the global version it started from
    rank: Count
    labels: tuple[str, ...]
