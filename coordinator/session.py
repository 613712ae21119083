"""Make a session: who is there, steps 1–4 of the protocol with them, and who was lost meanwhile.

The core decides what is legal; here is the order of things. ``coordinator.rounds`` goes on from the session.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from adapters.layout import Layout
from aggregation import server
from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError, ProtocolError
from aggregation.pki import Root
from aggregation.server import Established, Offering, RoundAborted, Sharing
from aggregation.steps import PROOF, REVOCATIONS, Step
from coordinator.recorder import Recorder
from coordinator.statedir import CoordinatorStateDir
from coordinator.wire import Wire

log = logging.getLogger("edgeadapt.coordinator")
S = TypeVar("S")


@dataclass(slots=True)
class Fleet:
    """The devices that a session was made with: device → Flower node, and who is lost where in the round under way.

    What is asked and answered goes into the session's transcript.
    """

    wire: Wire
    nodes: Mapping[str, int]
    recorder: Recorder
    lost: dict[str, str] = field(default_factory=dict)

    def gather(
        self,
        state: S,
        accept: Callable[[S, str, bytes], S],
        step: Step,
        bodies: Mapping[str, bytes],
        *,
        group: str,
        beside: Mapping[str, Mapping[str, bytes]] | None = None,
    ) -> S:
        """Ask each device of ``bodies`` and let the state ``accept`` each answer as it comes."""
        devices = {self.nodes[device]: device for device in bodies}
        asked = {self.nodes[device]: body for device, body in bodies.items()}
        extra = {self.nodes[device]: fields for device, fields in (beside or {}).items()}
        self.recorder.sent(step, bodies)
        for reply in self.wire.ask(step, asked, group, extra):
            device = devices[reply.node]
            try:
                if reply.body is None:
                    raise ProtocolError(reply.reason)
                state = accept(state, device, reply.body)
                self.recorder.received(step, device, reply.body)
                log.debug("%s answered %s", device, step.value, extra={"answered": step.value})
            except ProtocolError as error:
                self.lost[device] = step.value
                log.info("%s lost at %s: %s", device, step.value, error)
        return state


def establish(state_dir: CoordinatorStateDir, wire: Wire, rounds: int, group: str) -> tuple[Fleet, Established]:
    """A session of ``rounds`` rounds with the devices that can be reached.

    Raises:
        EdgeAdaptError: It could not be made in ``settings.attempts`` tries, or the registry failed.
    """
    reason = ""
    for attempt in range(1, state_dir.settings.attempts + 1):
        outcome = _session(state_dir, wire, rounds, f"{group}-{attempt}")
        if not isinstance(outcome, RoundAborted):
            return outcome
        reason = outcome.detail
        log.warning("session not made, attempt %d of %d: %s", attempt, state_dir.settings.attempts, reason)
    raise EdgeAdaptError(f"no session after {state_dir.settings.attempts} attempts: {reason}")


def _session(
    state_dir: CoordinatorStateDir, wire: Wire, rounds: int, group: str
) -> tuple[Fleet, Established] | RoundAborted:
    """Steps 1–4 of the protocol."""
    version = state_dir.latest()
    root = state_dir.trusted(datetime.now(UTC))
    certificates, nodes, seen = _roll_call(root, wire, group)
    least = state_dir.settings.aggregation.minimum_devices
    if len(nodes) < least:
        return RoundAborted(server.AbortReason.TOO_FEW, f"{len(nodes)} devices answered, {least} are needed", None)
    layout = Layout.of(state_dir.registry.tensors(version.manifest.version))
    spec = state_dir.settings.aggregation.spec(len(nodes), layout, version.manifest.base_digest, rounds)
    offering, offer = server.open_session(state_dir.key, root, spec, certificates, SystemEntropy(), datetime.now(UTC))
    fleet = Fleet(wire, nodes, state_dir.transcripts.begin(offering.offer, root.revoked))
    offers = dict.fromkeys(nodes, offer)
    revoked = {REVOCATIONS: root.revoked.der} if root.revoked else {}
    extra = beside(state_dir.transcripts.passages(fleet.recorder, seen), revoked)
    sharing = fleet.gather(offering, Offering.on_advert, Step.OFFER, offers, group=group, beside=extra).close()
    if isinstance(sharing, RoundAborted):
        return sharing
    state, roster = sharing
    rosters = {device: roster for device in nodes if device not in fleet.lost}
    session = fleet.gather(state, Sharing.on_shares, Step.ROSTER, rosters, group=group).close()
    if isinstance(session, RoundAborted):
        return session
    fleet.recorder.checkpoint()
    log.info("session of %d devices for %d rounds", len(nodes) - len(fleet.lost), rounds)
    return fleet, session


def _roll_call(root: Root, wire: Wire, group: str) -> tuple[dict[str, bytes], dict[str, int], dict[str, bytes]]:
    """Ask every node who it is; keep those with a certificate of the authority's, one node a device.

    Returns:
        Device → certificate, device → node, and device → the offer that it says it joined last.
    """
    certificates: dict[str, bytes] = {}
    nodes: dict[str, int] = {}
    seen: dict[str, bytes] = {}
    for reply in wire.ask(Step.CHECK_IN, dict.fromkeys(wire.nodes(), b""), group):
        try:
            device, _ = root.verify(reply.body or b"", datetime.now(UTC))
        except EdgeAdaptError as error:
            log.info("node %d is not taken: %s", reply.node, reply.reason or error)
            continue
        if device in nodes:
            log.warning("node %d is not taken: node %d said before that it is %s", reply.node, nodes[device], device)
            continue
        certificates[device], nodes[device], seen[device] = reply.body or b"", reply.node, reply.seen
    return certificates, nodes, seen


def beside(proofs: Mapping[str, bytes], shared: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Device → fields beside its message: its own proof, and what all get alike."""
    return {device: {PROOF: proof, **shared} for device, proof in proofs.items()}
