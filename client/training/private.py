"""The parts of an adapter that a device trains in the rounds and does not share, as tensors. The device keeps them
between rounds (``client.node.privateparts``)."""

import hashlib
from dataclasses import asdict

from edgeadapt.formats import files, jsontext
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods.parts import part_of
from edgeadapt.rounds.task import Task


def subject_of(base: str, task: Task, layout: Layout) -> bytes:
    """Digest (SHA-256) what private parts belong to: base (hex digest), method, labels and layout of the adapter."""
    named = [base, asdict(task.peft_config), list(task.labels), layout.digest]
    return hashlib.sha256(jsontext.encode(named)).digest()


def with_private(adapter: Tensors, own: bytes | None, task: Task) -> Tensors:
    """Add the parts of this device that are private in the task, whatever else its file has. The numbers of a part that
    the task shares come from ``adapter``, as on offer, alone. ``own``: safetensors file of parts that the device kept
    to itself; None if it has none."""
    return adapter if own is None else adapter | private_of(files.decode(own), task)


def private_of(tensors: Tensors, task: Task) -> Tensors:
    """Select the tensors that the task trains and does not share."""
    return {name: value for name, value in tensors.items() if part_of(name) in task.private}
