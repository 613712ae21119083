"""Whether the newest adapter hardly differs from those before it, so that devices take it for one of them.

Without noise, devices help to a sum from such an adapter over the devices of the last sum only
(``client.node.sumhistory``). An honest coordinator then plans for these.
"""

import logging
import math
from collections.abc import Collection
from dataclasses import replace

from aggregation.policy import Policy
from coordinator.lastsum import LastSum
from coordinator.registry import Registry, StoredAdapter
from coordinator.settings import FederationSettings
from edgeadapt.methods.parts import Part
from edgeadapt.rounds.optimizer import FedAdam, FedAvg, FedAvgM
from edgeadapt.rounds.roundtask import RoundTask, distance

SHARE = Policy().minimum_movement
MARGIN = 1.5  # devices know distances up to some percent, and their owners may demand more
DEPTH = 64  # versions that are compared
log = logging.getLogger("edgeadapt.coordinator")


def bound(
    last: LastSum, registry: Registry, adapter: StoredAdapter, task: RoundTask, settings: FederationSettings
) -> LastSum | None:
    """Keep the last sum if devices demand that the next one is over its devices; None if they do not.

    Raises TrustError: the registry was altered.
    """
    kinds = {last.kind, type(task)}
    if settings.privacy.noisy or settings.aggregation.groups > 1 or any(kind.EXACT is None for kind in kinds):
        return None
    parts = task.influencing() | ({Part.HEAD} if len(kinds) > 1 else frozenset())
    still = _stands_still(registry, adapter, parts, MARGIN * _least(adapter, task, settings))
    return replace(last, still=True) if still else None


def _stands_still(registry: Registry, adapter: StoredAdapter, parts: Collection[Part], least: float) -> bool:
    newest, after = adapter.manifest.version, adapter.tensors
    for number in range(newest - 1, max(newest - 1 - DEPTH, -1), -1):
        before = registry.tensors(number)
        if distance(before, adapter.tensors, parts) < least:
            return True
        if distance(before, after, parts) >= least:
            return False
        after = before
    return False


def warn(adapter: StoredAdapter, settings: FederationSettings) -> None:
    """Tell the operator if the server's step is so short that devices take every adapter for the previous one."""
    if settings.privacy.noisy or not settings.training_rounds:
        return
    task = settings.task(adapter.manifest)
    least, farthest = _least(adapter, task, settings), _farthest(adapter, task, settings)
    if farthest < least:
        text = (
            "server.learning_rate %g moves the adapter by at most %.2g in a round, and devices take less than %.2g for "
        )
        text += "the same adapter: each round needs all survivors of the last one; raise it, or set privacy.epsilon"
        log.warning(text, settings.server.learning_rate, farthest, least)


def _least(adapter: StoredAdapter, task: RoundTask, settings: FederationSettings) -> float:
    return task.least_movement(settings.clip_norm(task), task.state_size(adapter.layout), SHARE)


def _farthest(adapter: StoredAdapter, task: RoundTask, settings: FederationSettings) -> float:
    """The farthest that a server's step moves the adapter, L2 norm."""
    clip, rule = settings.clip_norm(task), settings.server.rule()
    if isinstance(rule, FedAvg):
        return rule.learning_rate * clip
    if isinstance(rule, FedAvgM):
        return rule.learning_rate * clip / (1 - rule.momentum)
    if not isinstance(rule, FedAdam):
        return math.inf
    most = max(1.0, (1 - rule.beta1) / math.sqrt(1 - rule.beta2))  # step of a coordinate, in learning rates
    return rule.learning_rate * most * math.sqrt(task.state_size(adapter.layout))
