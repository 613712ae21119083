"""Step 0 of the protocol: which certified devices there are, and at which nodes."""

import logging
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from aggregation import checks, envelope
from aggregation.entropy import SystemEntropy
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import DIGEST, Challenge, CheckIn
from aggregation.pki import Root
from aggregation.pki.certificates import identity, load, same_name
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from coordinator.lastsum import LastSum
from coordinator.settings import CohortSettings
from coordinator.transport import Enough, Transport

log = logging.getLogger("edgeadapt.coordinator")
CHECK_INS = 2  # challenges in an attempt, where a device is needed that did not answer the first


@dataclass(frozen=True, slots=True)
class CheckedIn:
    """The devices that are there."""

    answers: Mapping[str, CheckIn]  # device → its answer to the challenge
    nodes: Mapping[str, int]  # device → Flower node, of the same devices
    at: datetime  # when all their certificates are valid

    def only(self, devices: Collection[str]) -> "CheckedIn":
        """Keep ``devices`` only, in that order."""
        answers = {device: self.answers[device] for device in devices}
        return CheckedIn(answers, {device: self.nodes[device] for device in devices}, self.at)


def check_in(
    key: IdentityKey, root: Root, transport: Transport, group: str, last: LastSum | None, cohort: CohortSettings
) -> CheckedIn:
    """Challenge nodes; keep those that prove which certified device they are, one node for each device.

    Where a cohort has a size, the nodes are chosen at random, and the first devices that check in are kept. But while
    the next round is bound to the survivors of the ``last`` sum, every node is challenged: nobody else knows where they
    are.

    A device at two nodes has its key at both, and so has one with two names. It takes part at the node that answers
    first. While a survivor of the ``last`` sum is absent, the nodes without a device are challenged again.

    Returns the devices whose certificates are still valid at its end.
    """
    listed = transport.nodes()
    sampled = bool(cohort.size) and last is None
    asked = choose(listed, cohort, group) if sampled else listed
    enough = Enough(cohort.size, 0.0) if sampled else None
    if sampled:
        log.info("%d of %d nodes are asked to check in", len(asked), len(listed))
    present: dict[str, CheckIn] = {}
    admitted: dict[str, str] = {}  # name without case, and id of the key → device
    nodes: dict[str, int] = {}
    for attempt in range(1, CHECK_INS + 1):
        left = set(asked if sampled else transport.nodes()).difference(nodes.values())
        challenges = {node: Challenge(SystemEntropy().bytes(DIGEST), node) for node in sorted(left)}
        bodies = {node: envelope.sign(key, challenge) for node, challenge in challenges.items()}
        name = group if attempt == 1 else f"{group}-{attempt}"
        for reply in transport.ask(Step.CHECK_IN, bodies, name, enough=enough):
            try:
                device, answer = checks.check_in(root, challenges[reply.node], reply.answer(), datetime.now(UTC))
            except ProtocolError as error:
                log.info("node %d is not admitted: %s", reply.node, error)
                continue
            names = same_name(device), identity(load(answer.certificate)).key_id
            if twin := admitted.get(names[0]) or admitted.get(names[1]):
                log.warning("node %d is not admitted: node %d checked in as %s before", reply.node, nodes[twin], twin)
                continue
            admitted |= dict.fromkeys(names, device)
            present[device], nodes[device] = answer, reply.node
        if last is None or not last.unmet(nodes, root.revoked):
            break
    return _still_valid(root, CheckedIn(present, nodes, datetime.now(UTC)))


def choose(nodes: Sequence[int], cohort: CohortSettings, group: str) -> tuple[int, ...]:
    """Choose the nodes that are asked to check in: all alike likely, ``size`` times ``over_selection`` of them.

    Args:
        nodes: All that there are, in ascending order.
        group: Of the session; with a seed, it and the nodes determine the choice.
    """
    count = min(math.ceil(cohort.size * cohort.over_selection), len(nodes))
    seed = None if cohort.seed == "random" else [cohort.seed, zlib.crc32(group.encode())]
    chosen = np.random.default_rng(seed).choice(len(nodes), size=count, replace=False)
    return tuple(nodes[int(i)] for i in sorted(chosen))


def _still_valid(root: Root, present: CheckedIn) -> CheckedIn:
    """Keep the devices whose certificates did not expire while the others checked in."""
    valid: list[str] = []
    for device, node in present.nodes.items():
        try:
            root.verify(present.answers[device].certificate, present.at)
            valid.append(device)
        except TrustError as error:
            log.info("node %d is not admitted: %s", node, error)
    return present.only(valid)
