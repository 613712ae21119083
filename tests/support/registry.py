"""Rounds to put into a registry. A script that a test starts imports them as well."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adapters import files
from adapters.layout import Layout, Tensors
from adapters.manifest import PeftConfig, ServerRule, VersionManifest
from aggregation.pki.identity import IdentityKey
from coordinator.registry import Registry, RoundRecord


def _tensors(value: float) -> Tensors:
    return {"a": np.full((2, 3), value, np.float32), "b": np.full(4, -value, np.float32)}


LAYOUT = Layout.of(_tensors(0))


def _manifest(number: int) -> VersionManifest:
    blob = files.encode(_tensors(number))
    return VersionManifest(
        version=number,
        sha256=files.sha256(blob),
        size=len(blob),
        base_digest="b" * 64,
        layout_digest=LAYOUT.digest,
        parent=files.sha256(files.encode(_tensors(number - 1))) if number else None,
        round=number,
        plan=f"{number:064x}" if number else None,
        rule=ServerRule("FedAvg", {"learning_rate": 1.0}) if number else None,
        survivors=("anna", "ben") if number else (),
        metrics={"loss": 1 / number} if number else {},
        peft_config=PeftConfig("LORA", 8, 16, ("query", "value")),
        labels=("on", "off"),
    )


def _record(number: int) -> RoundRecord:
    return RoundRecord(
        round=number,
        survivors=("anna", "ben"),
        dropped={"cora": "plan"},
        aborted=None,
        bytes_up=3 * 10**10,
        bytes_down=7,
        seconds=2.5,
        metrics={"loss": 1 / number},
        version=number,
    )


@dataclass(frozen=True)
class Rounds:
    """Version ``n`` holds the value ``n`` everywhere, is of round ``n``, and leaves ``n`` as optimizer state."""

    key: IdentityKey
    layout: Layout = LAYOUT

    tensors = staticmethod(_tensors)
    manifest = staticmethod(_manifest)
    record = staticmethod(_record)

    def blob(self, number: int) -> bytes:
        return files.encode(_tensors(number))

    def aborted(self, number: int) -> RoundRecord:
        return replace(_record(number), survivors=(), aborted="two devices are too few", version=None, metrics={})

    def seed(self, registry: Registry) -> None:
        registry.publish(_manifest(0), self.blob(0), self.key)

    def commit(self, registry: Registry, number: int) -> None:
        state = {"first": np.full(5, number, np.float32)}
        registry.commit_round(_record(number), _manifest(number), self.blob(number), state, self.key)

    def snapshot(self, registry: Registry) -> tuple[Any, ...]:
        """Everything that a registry holds, to compare two moments."""
        numbers = range(len(registry.versions()))
        state = {name: value.tolist() for name, value in registry.optimizer_state().items()}
        return registry.versions(), registry.rounds(), [registry.blob(n) for n in numbers], state
