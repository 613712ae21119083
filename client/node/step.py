"""One protocol step of one device: bytes in, one state transition, bytes out. No transport is known here.

The protocol core decides what is legal, the trainer trains, and the state directory keeps the state between messages,
because each message may be handled by another process; a simulation keeps it in memory. Flower
(``client.node.app``) carries the bytes. A refusal is a value. Its reason says what is wrong with the coordinator's
message; an error in the device's own files is only logged here, and the reason says no more than that there was one.

No answer depends on the device's examples, except for the numbers under the mask, and for whether there are as many as
the owner demands. Only an offer, with which they are copied, and a plan make the device read them. What a plan asks for
is checked before that, and whatever fails afterwards gives an update of zero (``client.node.training``); the answer
leaves at a time that does not show when the device was done."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum

from aggregation import client, envelope, masks
from aggregation.client import Advertised, Confirmed, Device, Masked, Planned, Ready
from aggregation.entropy import DerivedEntropy, SystemEntropy
from aggregation.errors import DataError, EdgeAdaptError, ProtocolError, TrustError
from aggregation.messages import Offer, Plan, Survivors, Unmask
from aggregation.sealedstate import ClientState
from aggregation.session import COORDINATOR, refused
from aggregation.spec import SessionSpec
from aggregation.steps import ADAPTER, BODY, CONSENT, PROOF, REVOCATIONS, Step
from aggregation.transcript.log import logged_part
from aggregation.transcript.logstate import LogState
from client.node import adapterstate, privacyledger, sumhistory, tasklabels
from client.node.adapterstate import AdapterState
from client.node.eligibility import LOOK, EligibilityError, conditions, machine_conditions, read_trained, require
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts
from client.node.readings import SYSTEM, Readings
from client.node.statedir import DeviceStateDir
from client.node.sumhistory import SumHistory
from client.node.tasklabels import TaskLabels
from client.node.training import TrainingDevice, adapter_of, contribute
from client.training.engine import TrainerOf, trainer_of
from client.training.trainer import FrozenBase
from edgeadapt.formats.cores import cores
from edgeadapt.rounds import taskkinds

READS_EXAMPLES = (Step.OFFER, Step.PLAN)
JOINS = (Step.CHECK_IN, Step.OFFER)
log = logging.getLogger("edgeadapt.device")


class RefusalCode(IntEnum):
    """Why a device has no answer. Flower leaves error codes from 100 on to applications."""

    REFUSED = 100  # the device refused; the reason says why
    FAILED = 101  # an error of the device, such as a full disk
    NOT_ELIGIBLE = 102  # a condition of the owner is not met now


@dataclass(frozen=True, slots=True)
class Refusal:
    """Sent instead of an answer. ``reason``: one line, which reveals nothing about the device's files."""

    code: RefusalCode
    reason: str


def answer(
    open_state: Callable[[], DeviceStateDir],
    step: Step,
    fields: Mapping[str, bytes],
    node: int,
    choose: TrainerOf = trainer_of,
    readings: Readings = SYSTEM,
) -> bytes | Refusal:
    """Answer one request of the coordinator. The new state is saved before the return.

    Args:
        open_state: Opens the device's state, for this request only.
        fields: Of the request (``aggregation.steps``): the signed body, and what is in the same message.
        node: The device's node on the coordinator's grid. It answers challenges for this node only.
        readings: Of the machine, for the owner's conditions (``client.node.eligibility``).

    Returns:
        The signed answer, or a refusal. No error is raised: what went wrong may name files of the device.
    """
    arrived = time.monotonic()
    try:
        state_dir = open_state()
        quantum = state_dir.settings.policy.answer_quantum_seconds if step in READS_EXAMPLES else 0.0
        # The lock is held while the answer waits: another message would be answered as soon as the training ended.
        with state_dir.locked(), _delayed(arrived, quantum):
            if BODY not in fields:
                raise refused("the message has no body", "message.body")
            if step in JOINS:
                reads = step in READS_EXAMPLES
                require(conditions(state_dir, readings, datetime.now().astimezone(), count_examples=reads))
            if step is Step.CHECK_IN:
                return _check_in(state_dir, fields, node)
            return _transition(state_dir, step, fields, choose, readings)
    except EligibilityError as error:
        log.info("%s declined: %s", step.value, error, extra={"about": error.about})
        return Refusal(RefusalCode.NOT_ELIGIBLE, "does not take part now")
    except EdgeAdaptError as error:
        log.warning("%s refused: %s", step.value, error, extra={"about": error.about})
        # Of an error in the device's own files, the coordinator learns no more than that there was one.
        own = "cannot take part; the device's log has the reason"
        return Refusal(RefusalCode.REFUSED, " ".join(str(error).split()) if isinstance(error, ProtocolError) else own)
    except Exception:
        log.exception("%s failed", step.value)
        return Refusal(RefusalCode.FAILED, "failed on the device; its log has the reason")


@contextmanager
def _delayed(arrived: float, quantum: float) -> Iterator[None]:
    """Wait at the end, also after an error, until a multiple of ``quantum`` seconds has passed since ``arrived``."""
    try:
        yield
    except Exception:
        _wait(arrived, quantum)
        raise
    _wait(arrived, quantum)


def _wait(arrived: float, quantum: float) -> None:
    if quantum:
        passed = time.monotonic() - arrived
        if passed > quantum:
            log.warning("answering took %d s: a larger answer_quantum_seconds would hide how long it took", passed)
        time.sleep(quantum - passed % quantum)


def _check_in(state_dir: DeviceStateDir, fields: Mapping[str, bytes], node: int) -> bytes:
    """Say who this device is, unless its owner contributes nothing to such a session; the plan is checked as well."""
    log_state = state_dir.load(LogState)
    last_offer = None if log_state is None else log_state.offer
    key, certificate, coordinator = state_dir.identity, state_dir.certificate, state_dir.coordinator
    checked_in = client.check_in(key, certificate, coordinator, fields[BODY], node=node, last_offer=last_offer)
    state_dir.settings.policy.require_consent(fields.get(CONSENT, b"").decode(errors="replace"))
    return checked_in


def _eligible(state_dir: DeviceStateDir, readings: Readings) -> Callable[[], None]:
    """Make a check of the machine that runs at most every ``LOOK`` seconds and raises ``EligibilityError``."""
    settings, looked = state_dir.eligibility, -LOOK

    def look() -> None:
        nonlocal looked
        if time.monotonic() >= looked + LOOK:
            require(machine_conditions(settings, readings, datetime.now().astimezone()))
            looked = time.monotonic()

    return look


def _transition(
    state_dir: DeviceStateDir, step: Step, fields: Mapping[str, bytes], choose: TrainerOf, readings: Readings
) -> bytes:
    """Load the state, make one step of the protocol, save the new state, and only then return the answer."""
    if step is Step.OFFER and REVOCATIONS in fields:
        _install_revocations(state_dir, fields[REVOCATIONS])
    # An offer starts a new session, so that a damaged state excludes the device from one session only.
    state = None if step is Step.OFFER else state_dir.load_state()
    body = fields[BODY]
    base = state_dir.base(_spec_of(state, body).base_digest if state or step is Step.OFFER else "")
    device = state_dir.device(base.digest)
    log_state = state_dir.load(LogState) if device.policy.demand_proofs else None
    after: ClientState
    if step is Step.OFFER:
        now = datetime.now(UTC)
        device.policy.check_revocations(device.root.revoked, now)
        after, answer = client.join(device, body, SystemEntropy(), now)
        trained = state_dir.load(TaskLabels)
        other = (trained.base if trained else state_dir.base().digest) != base.digest
        proofs = device.policy.demand_proofs
        log_state = device.log_state_of(after, log_state, _proof(fields), other_base=other) if proofs else None
        state_dir.take_snapshot(_examples(state_dir), device.public_key(after.share_key))
    elif step is Step.ROSTER and isinstance(state, Advertised):
        after, answer = state.on_roster(device, body, _dealing(state, body))
    elif step is Step.PLAN and isinstance(state, Ready | Planned | Masked | Confirmed):
        planned = state.on_plan(device, body, datetime.now(UTC))
        log_state = _after_receipt(device, log_state, fields, planned.plan)
        after, answer = _contribute(state_dir, device, planned, fields, base, choose, _eligible(state_dir, readings))
        log_state = log_state and log_state.contributed(planned.plan.digest(), logged_part(step, answer))
    elif step is Step.SURVIVORS and isinstance(state, Masked):
        after, answer = state.on_survivors(device, body)
        # It signs for no sum for which it would reveal no shares. With groups, others then count on its signature.
        bound = _after_sum(state_dir, device, state, after.survivors)
        if state.ready.session.spec.grouping:
            _save_bound(state_dir, *bound)
        log_state = log_state and log_state.on_survivors(after.survivors.vectors, answer)
    elif step is Step.UNMASK and isinstance(state, Masked | Confirmed):
        after, answer = state.on_unmask(device, body)
        survivors = Unmask.decode(envelope.unverified_body(body)).survivors
        if not state.ready.session.spec.grouping:
            _save_bound(state_dir, *_after_sum(state_dir, device, state, survivors))
        spec, many, left = state.ready.session.spec, len(state.ready.serials), len(survivors.vectors)
        ledger = state_dir.load(PrivacyLedger) or PrivacyLedger()  # charged for the shares that this device reveals
        state_dir.save(privacyledger.on_survivors(ledger, spec, many, left, device.policy))
        log_state = log_state and log_state.on_survivors(survivors.vectors)
    else:
        held = "has joined no session" if state is None else f"is in the state {type(state).__name__}"
        raise refused(f"unexpected {step.value}: this device {held}", "step")
    state_dir.save_state(after)
    if isinstance(after, Masked):
        _forget_round(state_dir, after)
    if step is not Step.ROSTER:
        if log_state is None:
            state_dir.delete(LogState)
        else:
            state_dir.save(log_state)
    return answer


def _contribute(
    state_dir: DeviceStateDir,
    device: Device,
    planned: Planned,
    fields: Mapping[str, bytes],
    base: FrozenBase,
    choose: TrainerOf,
    look: Callable[[], None],
) -> tuple[Masked, bytes]:
    """Hold a plan to what the device allows, train and mask, and save what the contribution costs: it may leave.
    ``look``: of ``_eligible``."""
    adapter_state = adapterstate.on_plan(
        state_dir.load(AdapterState), planned.plan, planned.spec, device.policy.maximum_repeats
    )
    task = taskkinds.decode(planned.plan.training)
    labels = tasklabels.on_plan(state_dir.load(TaskLabels), base, task.labels)
    snapshot = state_dir.load_snapshot(_share_key(planned.ready))
    ledger = privacyledger.on_plan(
        state_dir.load(PrivacyLedger) or PrivacyLedger(), planned.spec, len(planned.ready.serials), device.policy
    )
    kept = state_dir.load(PrivateParts)
    blob = fields.get(ADAPTER, b"")
    history, adapter = state_dir.load(SumHistory) or SumHistory.new(SystemEntropy()), adapter_of(planned.plan, blob)
    # It is far enough from the adapters of earlier sums.
    history = sumhistory.on_plan(history, planned.plan, task, planned.spec, adapter, device.policy.minimum_movement)
    # Nothing is saved if the device stops here: it has answered no plan, and its keys masked nothing.
    look()
    files = state_dir.examples, state_dir.settings.policy, kept, state_dir.states()
    vector, parts = contribute(TrainingDevice(base, *files, choose, look), planned, task, blob, snapshot)
    masked, answer = planned.contribute(device, vector, cores())
    state_dir.save(ledger)  # first: whatever is interrupted after this counts as spent
    if parts is not None:
        state_dir.save(parts)
    _save_bound(state_dir, adapter_state, history)
    state_dir.save(labels)
    return masked, answer


def _install_revocations(state_dir: DeviceStateDir, raw: bytes) -> None:
    """Install the revocation list that the coordinator forwards. It can withhold a list, but not forge one."""
    state_dir.root()  # an error in the device's own files must not become a ProtocolError
    try:
        state_dir.revoke(raw)
    except TrustError as error:
        raise ProtocolError.of(error, COORDINATOR) from None


def _spec_of(state: ClientState | None, offer: bytes) -> SessionSpec:
    """Return the parameters of the session under way; without one, those of an offer, which is verified later."""
    match state:
        case None:
            return Offer.decode(envelope.unverified_body(offer)).spec
        case Advertised():
            return state.spec
        case Ready():
            return state.session.spec
    return state.ready.session.spec


def _after_receipt(
    device: Device, log_state: LogState | None, fields: Mapping[str, bytes], plan: Plan
) -> LogState | None:
    if not device.policy.demand_proofs:
        return None
    if log_state is None:
        reason = "this device has no log state of the session; it takes part again from the next offer on"
        raise ProtocolError(reason, about="log state")
    return device.followed(log_state, _proof(fields), plan)


def _after_sum(
    state_dir: DeviceStateDir, device: Device, state: Masked | Confirmed, survivors: Survivors
) -> tuple[AdapterState, SumHistory | None]:
    """Verify that the sum over ``survivors`` is over the devices of earlier ones from the same adapter, or a near one.
    Returns what to save before the device helps to it."""
    serials = {name: state.ready.serials[name] for name in survivors.vectors}
    facts = state.plan, state.ready.session.spec, serials, device.root.revoked.revoked if device.root.revoked else ()
    bound = adapterstate.on_survivors(state_dir.load(AdapterState), *facts)
    return bound, sumhistory.on_survivors(state_dir.load(SumHistory), *facts)


def _save_bound(state_dir: DeviceStateDir, adapter_state: AdapterState, history: SumHistory | None) -> None:
    """Replace what binds the device to survivors. After a kill between the two, it is bound and has not answered."""
    if history is not None:
        state_dir.save(history)
    state_dir.save(adapter_state)


def _share_key(ready: Ready) -> bytes:
    return ready.session.peers[ready.me].share_key


def _forget_round(state_dir: DeviceStateDir, masked: Masked) -> None:
    """Keep nothing of what was drawn in the round, and the snapshot for later rounds only if there are any."""
    if masked.ready.secrets:
        key = _share_key(masked.ready)
        state_dir.save_snapshot(state_dir.load_snapshot(key).since(masked.plan.round + 1), key)
    else:
        state_dir.delete_snapshot()


def _proof(fields: Mapping[str, bytes]) -> bytes:
    if PROOF not in fields:
        raise refused("the message has no proof about the log", "message.proof")
    return fields[PROOF]


def _dealing(joined: Advertised, roster: bytes) -> DerivedEntropy:
    """Draw the polynomials for a roster, and for the same roster the same ones. A device that is restored from a backup
    could be asked for its shares twice. Each neighbor's are encrypted under one key and nonce, so that two dealings
    would show the difference of their shares."""
    content = hashlib.sha256(envelope.unverified_body(roster)).digest()  # ``on_roster`` verifies it
    return DerivedEntropy(masks.derive(joined.share_key, b"edgeadapt/dealing/1", content))


def _examples(state_dir: DeviceStateDir) -> bytes:
    """Read what this session trains on; whether the examples can be read makes no difference to an answer."""
    try:
        return read_trained(state_dir)
    except DataError as error:
        log.warning("no examples for this session: %s", error, extra={"about": error.about})
        return b""
