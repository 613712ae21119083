"""An exported base: its files as bytes, and what is needed to encode adapters for it. Imports no framework."""

from dataclasses import dataclass, field
from enum import StrEnum

from adapters.base import Base
from adapters.bundle import MODEL
from adapters.files import sha256
from adapters.manifest import BaseManifest, Task
from adapters.peft.inputs import AdapterInputs

MAX_RANK = 64  # the default limit on the rank of an adapter's layers


class Profile(StrEnum):
    """How the weights of a base are stored and multiplied (``quantize.py``). A closed choice.

    ``native-int8``: the weights of MatMuls and embeddings in eight bits with a scale for each 32; activations are
    quantized at run time, in blocks too, so that no phrase of a batch changes the answer to another.
    ``native-int4``: the same in four bits with a zero point and a residual; embeddings stay in eight.
    ``web-int8``: int8 weights with a scale for each output, and one scale for all activations of a MatMul, which
    browsers multiply fast. MatMuls that lose too much by that stay in float (``calibrate.py``).
    """

    FP32 = "fp32"
    NATIVE_INT8 = "native-int8"
    NATIVE_INT4 = "native-int4"
    WEB_INT8 = "web-int8"


def metadata(base: Base, task: Task, profile: Profile, onnxruntime: str) -> dict[str, str]:
    """What the graphs of a base state about themselves, for people; a device reads the signed manifest instead."""
    return {"base_digest": base.digest, "task": task, "profile": profile.value, "minimum_onnxruntime": onnxruntime}


@dataclass(frozen=True, slots=True)
class ExportedBase:
    """A frozen base as a device runs it. One export serves every adapter of the same layers, whatever its rank."""

    base_digest: str
    task: Task
    profile: Profile
    adapter_inputs: AdapterInputs
    slots: dict[str, tuple[str, ...]]  # graph inputs that an adapter fills → dimensions as text
    max_rank: int
    onnxruntime: str  # the lowest version that runs the graphs
    opset: int  # of ONNX's operators
    files: dict[str, bytes] = field(repr=False)  # the base's folder without its manifest
    independent_rows: bool = False  # of a classifier: measured (``rows.py``)

    @property
    def model(self) -> bytes:
        """The native ONNX graph; its weights are in ``files[WEIGHTS]``."""
        return self.files[MODEL]

    @property
    def manifest(self) -> BaseManifest:
        """What the exporter signs about these files."""
        digests = {name: sha256(blob) for name, blob in self.files.items()}
        return BaseManifest(
            self.base_digest,
            self.task,
            self.profile.value,
            digests,
            self.slots,
            self.max_rank,
            self.independent_rows,
            self.onnxruntime,
            self.opset,
        )
