"""An exported base: its files, and what is needed to encode adapters for it. Imports no framework."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

from edgeadapt.bases.base import Base
from edgeadapt.formats.bundle import MODEL
from edgeadapt.formats.files import sha256
from edgeadapt.formats.manifest import BaseManifest, Task
from edgeadapt.formats.storage import WorkFolder
from edgeadapt.methods.peft.inputs import AdapterInputs

MAX_RANK = 64  # the default limit on the rank of an adapter's layers


Report = Callable[[str, int, int], object]  # a description of what an export does, and the bytes done of how many


class Profile(StrEnum):
    """How the weights of a base are stored and multiplied (``quantize.py``). A closed choice.

    ``native-int8``: the weights of MatMuls and embeddings in eight bits with a scale for each 32; activations are
    quantized at run time, in blocks too, so that no phrase of a batch changes the answer to another. ``native-int4``:
    the same in four bits with a zero point and a residual; embeddings stay in eight. ``web-int8``: int8 weights with a
    scale for each output, and one scale for all activations of a MatMul, which browsers multiply fast. MatMuls that
    lose too much by that stay in float (``calibrate.py``)."""

    FP32 = "fp32"
    NATIVE_INT8 = "native-int8"
    NATIVE_INT4 = "native-int4"
    WEB_INT8 = "web-int8"


def metadata(base: Base, task: Task, profile: Profile, onnxruntime: str) -> dict[str, str]:
    """State what the graphs of a base are, for people; a device reads the signed manifest instead."""
    return {"base_digest": base.digest, "task": task, "profile": profile.value, "minimum_onnxruntime": onnxruntime}


def written(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Write files by their names, and return the SHA-256 of each, hex."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: sha256(content) for name, content in files.items()}


def counted(report: Report, stage: str, total: int) -> Callable[[int], None]:
    """Make a function that takes the bytes of each step of a stage and reports their sum, out of ``total``."""
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        report(stage, min(done, total), total)

    report(stage, 0, total)
    return step


@dataclass(frozen=True, slots=True)
class ExportedBase:
    """A frozen base as a device runs it. One export serves every adapter of the same layers, whatever its rank."""

    manifest: BaseManifest  # states its files
    adapter_inputs: AdapterInputs
    work: WorkFolder = field(repr=False)  # holds the files; they are deleted with it
    untrainable: str = ""  # why it has no training graph, if one was tried
    gradients: float | None = None  # its training graph's largest difference from torch's (``check_gradients``)

    @property
    def folder(self) -> Path:
        return self.work.path

    @property
    def model(self) -> bytes:
        """Its weights are in the file ``WEIGHTS``."""
        return self.read(MODEL)

    @property
    def size(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.manifest.files)

    def with_file(self, name: str, content: bytes) -> Self:
        files = self.manifest.files | written(self.folder, {name: content})
        return replace(self, manifest=replace(self.manifest, files=files))

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()
