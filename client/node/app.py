"""The device's Flower ClientApp: one message in, one state transition, one message out.

It only moves bytes: the protocol core decides what is legal, the trainer trains, and the home keeps the state between
messages, whichever process answers the next one. A refusal goes back as an error reply; what concerns the device's own
examples is logged here and travels as nothing but the fact.
"""

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from adapters import files
from adapters.base import Base, find_base
from adapters.cores import cores
from adapters.layout import Layout
from adapters.task import Task
from aggregation import client, envelope
from aggregation.client import Advertised, Confirmed, Device, Masked, Planned, Ready
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, ProtocolError, TrustError
from aggregation.messages import Unmask
from aggregation.ring import Ring
from aggregation.sealed import ClientState
from aggregation.session import COORDINATOR
from aggregation.steps import ADAPTER, BODY, LAST_OFFER, PROOF, RECORD, REVOCATIONS, Step
from aggregation.transcript import LogState, logged_part
from client.node.statedir import DeviceStateDir
from client.training.examples import Split, part, read_examples

STATE = "state"  # key of the node's configuration: the device's folder
REFUSED = 100  # Flower error code: the device refused; the reason says why
FAILED = 101  # Flower error code: a fault of the device's, such as a full disk

log = logging.getLogger("edgeadapt.device")
app = ClientApp()


def _handler(message: Message, context: Context) -> Message:
    step = Step(message.metadata.message_type.partition(".")[2])
    try:
        state_dir = DeviceStateDir.open(Path(str(context.node_config.get(STATE, ""))))
        with state_dir.locked():
            answer = (
                _hello(state_dir) if step is Step.CHECK_IN else {BODY: _transition(state_dir, step, _fields(message))}
            )
        return Message(RecordDict({RECORD: ConfigRecord(dict(answer))}), reply_to=message)
    except EdgeAdaptError as error:
        log.warning("%s refused: %s", step.value, error)
        return Message(Error(REFUSED, _reason(error)), reply_to=message)
    except Exception:
        # Flower would send the text of whatever is raised here, and that may quote an example.
        log.exception("%s failed", step.value)
        return Message(Error(FAILED, "failed on the device, whose log says why"), reply_to=message)


for _step in Step:
    _register = app.train if _step is Step.PLAN else app.query
    _register(_step.value)(_handler)


def _reason(error: EdgeAdaptError) -> str:
    """What may travel: what was wrong with the coordinator's message; of the device's own matters only the kind."""
    if isinstance(error, ProtocolError):
        return " ".join(str(error).split())
    return "no usable examples" if isinstance(error, DataError) else "cannot take part, and the device's log says why"


def _fields(message: Message) -> Mapping[str, bytes]:
    record = message.content.config_records.get(RECORD)
    fields = {} if record is None else {key: value for key, value in record.items() if isinstance(value, bytes)}
    if BODY not in fields:
        raise ProtocolError("the message carries no protocol body")
    return fields


def _hello(state_dir: DeviceStateDir) -> dict[str, bytes]:
    log_state = state_dir.load_log_state()
    return {BODY: state_dir.certificate, LAST_OFFER: b"" if log_state is None else log_state.offer}


def _transition(state_dir: DeviceStateDir, step: Step, fields: Mapping[str, bytes]) -> bytes:
    """One step of the protocol: load the state, move on, seal the new state, and only then answer."""
    base = find_base(state_dir.settings.base)
    if step is Step.OFFER and REVOCATIONS in fields:
        _hear_revocations(state_dir, fields[REVOCATIONS])
    device, body = state_dir.device(base.digest), fields[BODY]
    # An offer begins anew, so that a state which can no longer be read shuts a device out of one session only.
    state = None if step is Step.OFFER else state_dir.load_state()
    seen = state_dir.load_log_state() if device.policy.demand_proofs else None
    after: ClientState
    if step is Step.OFFER:
        now = datetime.now(UTC)
        device.policy.check_revocations(device.root.revoked, now)
        after, answer = client.join(device, body, SystemEntropy(), now)
        seen = _led_to(device, seen, fields, after)
    elif step is Step.ROSTER and isinstance(state, Advertised):
        after, answer = state.on_roster(device, body, SystemEntropy())
    elif step is Step.PLAN and isinstance(state, Ready | Planned | Masked | Confirmed):
        planned = state.on_plan(device, body)
        seen = _shown(device, seen, fields)
        after, answer = planned.contribute(device, _train(state_dir, base, planned, fields.get(ADAPTER, b"")), cores())
        seen = seen and seen.contributed(planned.plan.digest(), logged_part(step, answer))
    elif step is Step.SURVIVORS and isinstance(state, Masked):
        after, answer = state.on_survivors(device, body)
        seen = seen and seen.on_survivors(after.survivors.vectors, answer)
    elif step is Step.UNMASK and isinstance(state, Masked | Confirmed):
        after, answer = state.on_unmask(device, body)
        seen = seen and seen.on_survivors(Unmask.decode(envelope.unverified_body(body)).survivors.vectors)
    else:
        holds = "no session" if state is None else f"the state {type(state).__name__}"
        raise ProtocolError(f"{step.value} is not what comes next: this device holds {holds}")
    state_dir.save_state(after)
    if step is not Step.ROSTER:
        state_dir.save_log_state(seen)
    return answer


def _hear_revocations(state_dir: DeviceStateDir, raw: bytes) -> None:
    """What the coordinator passes on; of the authority's word it cannot make a newer one, only keep it back."""
    state_dir.root()  # what is wrong with this device's own files does not travel
    try:
        state_dir.revoke(raw)
    except TrustError as error:
        raise ProtocolError(str(error), COORDINATOR) from None


def _led_to(device: Device, seen: LogState | None, fields: Mapping[str, bytes], joined: Advertised) -> LogState | None:
    """From the log that this device saw last to that of the session which it joins."""
    if not device.policy.demand_proofs:
        return None
    proof = _proof(fields)
    if seen is None:
        return LogState.initial(device.coordinator, proof, joined.offer, joined.me)
    return seen.on_session_chain_proof(device.coordinator, proof, joined.offer)


def _shown(device: Device, seen: LogState | None, fields: Mapping[str, bytes]) -> LogState | None:
    """What the log shows of this device's last round, before it takes part in the next."""
    if not device.policy.demand_proofs:
        return None
    if seen is None:
        raise ProtocolError("this device kept nothing of the session's log; it takes part again from the next offer")
    return seen.on_receipt(device.coordinator, _proof(fields))


def _proof(fields: Mapping[str, bytes]) -> bytes:
    if PROOF not in fields:
        raise ProtocolError("no proof of what the log holds came along", COORDINATOR)
    return fields[PROOF]


def _train(state_dir: DeviceStateDir, base: Base, planned: Planned, blob: bytes) -> Ring:
    """Train on the home's examples from the adapter in ``blob``; return what may leave under the mask."""
    # Not at the top: Flower starts a process for every message, and five of six need not wait seconds for torch.
    from adapters.classifier import LoraSpec
    from client.training.contribute import Outcome, contribution, require_bounds
    from client.training.trainer import seed, trainer

    plan, spec = planned.plan, planned.spec
    if files.sha256(blob) != plan.adapter_digest:
        raise ProtocolError("the adapter beside the plan is not the one that the plan names")
    task = Task.decode(plan.training)
    try:
        start = files.decode(blob)
        mine = trainer(base, len(task.labels), LoraSpec.of(task.method))
    except (DataError, ConfigError) as error:  # of the coordinator's making, so it may hear what
        raise ProtocolError(f"adapter and task: {error}") from error
    if not Layout.of(start).digest == mine.layout.digest == spec.layout_digest:
        raise ProtocolError("offer, task and adapter are not of one layout")
    require_bounds(spec, mine.layout)
    examples = read_examples(state_dir.examples, len(task.labels))
    train_part = part(examples, Split.TRAIN)
    salt = f"{planned.ready.me}/{plan.adapter_version}"
    begin = time.perf_counter()
    held_out = mine.score(start, part(examples, Split.VALIDATION)[: spec.weight_cap])
    trained = mine.train(start, train_part, task, epochs=task.epochs, salt=salt)
    seconds = time.perf_counter() - begin
    log.info("trained on %d examples", len(train_part), extra={"training_seconds": seconds})
    outcome = Outcome(start, trained, len(train_part), held_out, seconds)
    return contribution(outcome, mine.layout, spec, np.random.default_rng(seed(task, f"{salt}/rounding")))
