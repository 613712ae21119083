"""``gates.toml`` next to a repository of channels: what a release must pass before it is promoted."""

from typing import Literal, Self

from pydantic import Field, model_validator

from edgeadapt.formats.settings import Settings

GATES = "gates.toml"
HEADER = b"# The gates of a promotion. Paths are relative to this file. A gate that cannot be measured refuses.\n"
GateName = Literal["size", "parity", "accuracy", "language", "canaries"]


class SizeGate(Settings):
    """Size of what a device fetches."""

    adapter: int = Field(default=2**24, ge=1, description="most bytes of an adapter's file")
    release: int = Field(default=2**31, ge=1, description="most bytes of all files of a release, with the base")


class ParityGate(Settings):
    """The exported files against the trained model in torch, held to the limits of the base's profile."""

    state: str = Field(default="", description="the coordinator's state directory that has the version")
    base: str = Field(default="", description="the base of the training: a package, a folder or a GGUF file")
    texts: str = Field(default="", description="file of held-out texts, one a line")


class AccuracyGate(Settings):
    """Answers to held-out phrases, of the new release and of the current one."""

    held_out: str = Field(default="", description="file of lines LABEL TAB PHRASE TAB LANGUAGE")
    margin: float = Field(
        default=0.01, ge=0, le=1, description="how far the accuracy may be below that of the current release"
    )
    least: float = Field(default=0.0, ge=0, le=1, description="least accuracy, also of a channel's first release")
    fewest: int = Field(default=100, ge=1, description="fewest phrases that are a measurement")


class LanguageGate(Settings):
    """Accuracy on the held-out phrases of each language."""

    least: float = Field(default=0.5, ge=0, le=1, description="least accuracy in each language")
    fewest: int = Field(default=20, ge=1, description="fewest phrases of a language that are a measurement")


class CanaryGate(Settings):
    """Phrases of which each must have its answer."""

    phrases: str = Field(default="", description="file of lines LABEL TAB PHRASE")


class GateSettings(Settings):
    """``gates.toml`` of a repository of channels."""

    gates: tuple[GateName, ...] = Field(
        default=("size", "parity", "accuracy", "language", "canaries"),
        min_length=1,
        description="the gates that a release must pass; of a language model only size and parity can be measured",
    )
    size: SizeGate = SizeGate()
    parity: ParityGate = ParityGate()
    accuracy: AccuracyGate = AccuracyGate()
    language: LanguageGate = LanguageGate()
    canaries: CanaryGate = CanaryGate()

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        if len(set(self.gates)) != len(self.gates):
            raise ValueError("gates names a gate twice")
        return self
