"""Put together what a run says about itself, from the registry, the households' outcomes and the stages' times."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from adapters.base import Base
from coordinator.registry.roundrecord import RoundRecord
from simulations.engine import provision
from simulations.engine.publish import Published
from simulations.report.result import HouseholdResult, RoundResult, RunResult
from simulations.scenario import Scenario


def collect(
    out: Path,
    scenario: Scenario,
    base: Base,
    households: Sequence[HouseholdResult],
    published: Published,
    seconds: Mapping[str, float],
    report: Path,
) -> RunResult:
    """The result of the run in ``out``."""
    registry, parity = provision.registry(out), published.parity
    last = registry.latest() or registry.version(0)
    elements = sum(tensor.size for tensor in registry.tensors(last.manifest.version).values())
    fleet_size = sum(not household.unseen for household in households)
    return RunResult(
        scenario=scenario.name,
        seed=scenario.seed,
        households=tuple(households),
        rounds=tuple(_round(record, fleet_size) for record in registry.rounds()),
        adapter={
            "version": last.manifest.version,
            "sha256": last.manifest.sha256,
            "bytes": last.manifest.size,
            "elements": elements,
        },
        base={"digest": base.digest, "bytes": base.weight_bytes},
        bundle=str(published.bundle),
        report=str(report),
        parity={
            "agreement": parity.agreement,
            "max_abs_diff": parity.max_abs_diff,
            "count": parity.count,
            "accuracy": published.accuracy,
        },
        seconds={**seconds, "coordination": seconds["rounds"] - seconds["training"]},
    )


def _round(record: RoundRecord, fleet_size: int) -> RoundResult:
    return RoundResult(
        round=record.round,
        survivors=record.survivors,
        dropped=record.dropped,
        aborted=record.aborted,
        bytes_up=round(record.bytes_up / max(1, len(record.survivors))),
        bytes_down=round(record.bytes_down / fleet_size),
        seconds=record.seconds,
        metrics=record.metrics,
        version=record.version,
    )
