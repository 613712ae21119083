"""The last sum from an adapter, and what it demands of the next round from the same adapter.

Devices reveal shares for sums from one adapter over one set of survivors only, less those whose certificates were
revoked since (``client.node.adapterstate``). So after a round that ended without a result when devices had been asked
to unmask its sum, every later round from that adapter is over the same devices. A kill may have come before the round
was recorded: the log has the request before any device can have it. With groups, devices are bound as soon as they sign
a survivor set, and later rounds have the same groups. No later round shares what devices keep (``check_unshared``).

Where the newest adapter hardly differs from those before it, devices take it for one of them (without noise), and the
coordinator plans for the devices of the last sum as well (``binding``)."""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from aggregation import envelope
from aggregation.errors import ConfigError
from aggregation.messages import Assignment, Offer, Plan, Survivors, Unmask
from aggregation.pki.certificates import load, serial, subject
from aggregation.pki.revocation import RevocationList
from aggregation.policy import Policy
from aggregation.server import AbortReason
from aggregation.spec import SessionSpec
from aggregation.transcript.entries import Entry, Result
from coordinator.registry import Registry, StoredAdapter
from coordinator.settings import FederationSettings
from coordinator.transcripts import Transcripts
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import RoundRecord
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.rounds import taskkinds
from edgeadapt.rounds.optimizer import FedAdam, FedAvg, FedAvgM
from edgeadapt.rounds.roundtask import RoundTask, distance
from edgeadapt.rounds.task import Task

NAMED = 6  # devices that a text lists by name


@dataclass(frozen=True, slots=True)
class LastSum:
    """The last sum from an adapter that devices were asked to unmask. ``terms``: name of a setting → its value then,
    from ``terms``; empty for a sum of this run, whose settings stay."""

    adapter: str  # SHA-256 of the adapter's file, hex
    survivors: Mapping[str, int]  # device whose update is in it → serial of the certificate it had then
    blamed: frozenset[str] = frozenset()  # devices whose wrong shares were the reason that there is no result
    kind: type[RoundTask] = Task  # another sum from the adapter is of the same kind
    dealt: tuple[str, ...] = ()  # devices that were dealt into its groups; empty without groups
    still: bool = False  # whether it made a version, from which the newest one hardly differs (``stillness``)
    terms: Mapping[str, float | str] = field(default_factory=dict)

    def unmet(self, devices: Collection[str], revoked: RevocationList | None) -> str:
        """Explain what another sum over the same devices lacks, and what ends that; empty if nothing. Devices in
        ``revoked``, the list that their session applies, are not in another sum."""
        listed = revoked.revoked if revoked else {}
        due = sorted(device for device, number in self.survivors.items() if number not in listed)
        if spoilers := [device for device in due if device in self.blamed]:
            return f"waits until the authority revokes {names(spoilers)}, whose wrong shares spoiled the last sum"
        if absent := [device for device in due if device not in devices]:
            text = "bring back what is absent, or let the authority revoke it"
            return f"waits for {names(absent)}, of the last sum: {text}"
        return ""


def names(devices: Sequence[str]) -> str:
    return ", ".join(devices[:NAMED]) + (f" and {len(devices) - NAMED} more" if len(devices) > NAMED else "")


def terms(task: RoundTask, clip_norm: float, weight_cap: int, groups: int) -> dict[str, float | str]:
    """On these, devices train for all sums from an adapter alike (``client.node.adapterstate``)."""
    bounds: dict[str, float | str] = {"aggregation.clip_norm": clip_norm, "aggregation.weight_cap": weight_cap}
    bounds["aggregation.groups"] = groups
    return task.terms() | bounds


def serials(certificates: Iterable[bytes]) -> dict[str, int]:
    """Map each device to the serial of its certificate, for certificates in DER."""
    return {subject(load(der)): serial(der) for der in certificates}


def find(transcripts: Transcripts, adapter: str, records: Iterable[RoundRecord]) -> LastSum | None:
    """Find the last sum from ``adapter`` in the logs that a coordinator left; None if none could be unmasked.
    ``adapter``: SHA-256 of the newest adapter's file, hex. Raises TrustError: a log was altered."""
    unrecoverable = {record.plan: record for record in records if record.reason == AbortReason.UNRECOVERABLE.value}
    for entries in transcripts.sessions(backwards=True):
        if facts := _in_log(entries, adapter):
            plan, spec, survivors = facts
            record = unrecoverable.get(plan.digest().hex())
            task = taskkinds.decode(plan.training)
            then = terms(task, spec.clip_norm, spec.weight_cap, spec.groups)
            blamed = frozenset(record.blamed if record else ())
            dealt = tuple(sorted((*plan.members, *plan.former))) if spec.grouping else ()
            return LastSum(adapter, survivors, blamed, type(task), dealt, terms=then)
        if any(entry.kind == Result.TAG for entry in entries):  # what came before was from older adapters
            return None
    return None


def _in_log(entries: Iterable[Entry], adapter: str) -> tuple[Plan, SessionSpec, dict[str, int]] | None:
    certified: dict[str, int] = {}
    plan: Plan | None = None
    spec: SessionSpec | None = None
    number, facts = 0, None
    for entry in entries:
        body = envelope.unverified_body(entry.message)
        if entry.kind == Offer.TAG:
            offer = Offer.decode(body)
            certified, spec = serials(offer.certificates), offer.spec
        elif entry.kind == Assignment.TAG and entry.round > number:  # the first one of a round is complete
            number, plan = entry.round, Assignment.decode(body).plan
        elif entry.kind == Unmask.TAG and plan and spec and plan.adapter_digest == adapter:
            survivors = Unmask.decode(body).survivors.vectors
            facts = plan, spec, {device: certified[device] for device in survivors}
        elif entry.kind == Survivors.TAG and plan and spec and spec.grouping and plan.adapter_digest == adapter:
            facts = plan, spec, {device: certified[device] for device in Survivors.decode(body).vectors}
    return facts


def check_unshared(transcripts: Transcripts, task: RoundTask, layout: Layout) -> None:
    """Check that a task shares no part that a plan before it had devices train and keep to themselves.

    Logs are read from the newest one back, to a plan that shared as much: it passed this check. A part without a tensor
    in ``layout``, the adapter's, is neither shared nor kept. Raises ConfigError: it shares one. Raises TrustError: a
    log was altered."""
    shared = task.changes & {part_of(spec.name) for spec in layout.tensors}
    for entries in transcripts.sessions(backwards=True):
        for earlier in reversed([*_tasks(entries)]):
            if kept := sorted(shared & earlier.private):
                text = f"the method shares the part {kept[0]}, which devices kept to themselves in an earlier round, "
                text += "and so they refuse it: set a method that does not share it, or begin a new federation"
                raise ConfigError(text, about="method")
            if shared <= earlier.changes:
                return


def _tasks(entries: Iterable[Entry]) -> Iterator[RoundTask]:
    number = 0
    for entry in entries:
        if entry.kind == Assignment.TAG and entry.round > number:  # the first one of a round is complete
            number = entry.round
            yield taskkinds.decode(Assignment.decode(envelope.unverified_body(entry.message)).plan.training)


SHARE = Policy().minimum_movement
MARGIN = 1.5  # devices know distances up to some percent, and their owners may demand more
DEPTH = 64  # versions that are compared
log = logging.getLogger("edgeadapt.coordinator")


def binding(
    last: LastSum, registry: Registry, adapter: StoredAdapter, task: RoundTask, settings: FederationSettings
) -> LastSum | None:
    """Keep the last sum if devices demand that the next one is over its devices; None if they do not. Raises
    TrustError: the registry was altered."""
    kinds = {last.kind, type(task)}
    if settings.privacy.noisy or settings.aggregation.groups > 1 or any(kind.EXACT is None for kind in kinds):
        return None
    parts = task.influencing() | ({Part.HEAD} if len(kinds) > 1 else frozenset())
    still = _stands_still(registry, adapter, parts, MARGIN * _least(adapter, task, settings))
    return replace(last, still=True) if still else None


def _stands_still(registry: Registry, adapter: StoredAdapter, parts: Collection[Part], least: float) -> bool:
    newest, after = adapter.manifest.version, adapter.tensors
    for number in range(newest - 1, max(newest - 1 - DEPTH, -1), -1):
        if registry.version(number).manifest.base_digest != adapter.manifest.base_digest:
            return False
        before = registry.tensors(number)
        if distance(before, adapter.tensors, parts) < least:
            return True
        if distance(before, after, parts) >= least:
            return False
        after = before
    return False


def warn_of_stillness(adapter: StoredAdapter, settings: FederationSettings) -> None:
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
