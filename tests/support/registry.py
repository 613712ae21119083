"""Rounds to put into a registry. A script that a test starts imports them as well."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from aggregation.pki.identity import IdentityKey
from coordinator.registry import Registry, state_digest
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import PeftConfig, RoundRecord, ServerRule, VersionManifest, digest_of


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
        combination=None,
        survivors=("anna", "ben") if number else (),
        metrics={"loss": 1 / number} if number else {},
        privacy=None,
        peft_config=PeftConfig("LORA", 8, 16, ("query", "value")),
        labels=("on", "off"),
    )


def _state(number: int) -> Tensors:
    return {"first": np.full(5, number, np.float32)}


@dataclass(frozen=True)
class Rounds:
    """Version ``n`` holds the value ``n`` everywhere, is of round ``n``, and leaves ``n`` as optimizer state."""

    key: IdentityKey
    layout: Layout = LAYOUT

    tensors = staticmethod(_tensors)
    manifest = staticmethod(_manifest)
    state = staticmethod(_state)

    def record(self, number: int) -> RoundRecord:
        """The record of round ``number``, after rounds that all made a version."""
        manifest = _manifest(number)
        return RoundRecord(
            round=number,
            previous=digest_of(self.record(number - 1).sign(self.key)) if number > 1 else None,
            offer="0f" * 32,
            plan=manifest.plan,
            entries=10 * number,
            root="00" * 32,
            survivors=("anna", "ben"),
            groups=(),
            dropped={"cora": "plan"},
            blamed=(),
            reason=None,
            aborted=None,
            spoiled=None,
            sum="50" * 32,
            version=number,
            adapter=manifest.sha256,
            optimizer=state_digest(_state(number)),
            bytes_up=3 * 10**10,
            bytes_down=7,
            seconds=2.5,
            epsilon=None,
            metrics={"loss": 1 / number},
        )

    def aborted(self, number: int) -> RoundRecord:
        """The same for a round that made no version."""
        return replace(
            self.record(number),
            survivors=(),
            reason="too-few",
            aborted="two devices are too few",
            sum=None,
            version=None,
            adapter=None,
            optimizer=state_digest(_state(number - 1)) if number > 1 else None,
            metrics={},
        )

    def blob(self, number: int) -> bytes:
        return files.encode(_tensors(number))

    def seed(self, registry: Registry) -> None:
        registry.publish(_manifest(0), self.blob(0), self.key)

    def commit(self, registry: Registry, number: int) -> None:
        manifest, blob = _manifest(number), self.blob(number)
        registry.commit_round(self.record(number), manifest, blob, _state(number), self.key)

    def snapshot(self, registry: Registry) -> tuple[Any, ...]:
        """Everything that a registry holds, to compare two moments."""
        numbers = range(len(registry.versions()))
        state = {name: value.tolist() for name, value in registry.optimizer_state().items()} if numbers else {}
        return registry.versions(), registry.rounds(), [registry.blob(n) for n in numbers], state


def commit(registry: Registry, manifest: VersionManifest, blob: bytes, key: IdentityKey) -> VersionManifest:
    """Publish a version as a round would, whatever round and plan ``manifest`` names; the manifest as published."""
    if manifest.version == 0:
        return registry.publish(manifest, blob, key).manifest
    head = registry.head()
    number = head.round.round + 1 if head.round else 1
    manifest = replace(manifest, round=number, plan=f"{number:064x}")
    record = replace(
        Rounds(key).record(1),
        round=number,
        previous=head.digest,
        plan=manifest.plan,
        survivors=manifest.survivors,
        version=manifest.version,
        adapter=manifest.sha256,
        optimizer=None,
    )
    return registry.commit_round(record, manifest, blob, {}, key).manifest
