"""The device's side of a session in JavaScript (``page/aggregation/``), under Node, against the native one."""

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from aggregation import client, envelope, ring
from aggregation.envelope import ENVELOPE, Envelope
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Offer, Plan
from aggregation.pki import Authority, IdentityKey, Reason, Revocation, Root
from aggregation.pki.identity import PublicKey
from aggregation.policy import Policy
from aggregation.sealedstate import reopened
from aggregation.spec import Grouping, SessionSpec
from aggregation.transcript.logstate import LogState
from aggregation.vector import Segment, VectorSpec
from client.node import adapterstate
from client.node.step import _dealing
from client.training.examples import Score
from edgeadapt.formats.gateway import messages as gateway
from edgeadapt.formats.layout import Layout, TensorSpec
from edgeadapt.rounds.analytic import ClassifierHead, moment_contribution, moment_spec
from edgeadapt.rounds.ridge import moments_of
from edgeadapt.rounds.roundtask import Outcome
from edgeadapt.rounds.sums import Bounds
from edgeadapt.rounds.task import contribution, contribution_spec
from tests.aggregation.transcript import test_logstate
from tests.support import programs
from tests.support.fleet import ADAPTER, CountedEntropy, session_spec
from tests.support.logs import KEY, OFFERS, chain, chain_proof, log_of, seen
from tests.vectors.test_rounds import CASES, GivenEntropy, Walk, devices_of

raw = bytes.fromhex
STEPS = {"offer": "roster", "roster": "assignment", "assignment": "survivors", "survivors": "unmask", "unmask": ""}
"""Tag of what the coordinator sends → the next one."""
JS = Path(__file__).parent / "js" / "aggregation"


@pytest.fixture(scope="session")
def node() -> str:
    """Node alone: these modules need no library."""
    return programs.node()


def run(node: str, test: str, **environment: Path) -> None:
    """Run a file of tests under Node."""
    variables = os.environ | {name: str(path) for name, path in environment.items()}
    done = subprocess.run([node, "--test", str(JS / test)], capture_output=True, text=True, env=variables, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def refusals(case: dict[str, Any]) -> list[str]:
    """What a native device's refusal of each invalid message in a vector is about."""
    walk = Walk(case)
    walk.establish()
    walk.open(walk.collect())
    return [walk.about[bad["message"]] for bad in case["refused"]]


def dealt(case: dict[str, Any], name: str) -> str:
    """The shares of a native device whose polynomials follow from its share key and the roster."""
    device, roster = devices_of(case)[name], raw(case["roster"])
    advertised, _ = client.join(device, raw(case["offer"]), GivenEntropy(case["join"][name]))
    _, shares = advertised.on_roster(device, roster, _dealing(advertised, roster))
    return shares.hex()


def test_a_round_is_byte_for_byte_that_of_the_independent_script(tmp_path: Path, node: str) -> None:
    native = tmp_path / "native.json"
    found = {"about": {}, "dealt": {}}
    for label, case in CASES.items():
        found["about"][label], found["dealt"][label] = refusals(case), dealt(case, "unit-0")
    native.write_text(json.dumps(found))
    run(node, "rounds.test.mjs", EDGEADAPT_NATIVE=native)


# Hostile messages: signed by the coordinator, or not, and damaged everywhere

NUMBERS = (0, 1, 2, 5, 6, 65, 255, 2**31, 2**32 - 1)


def damaged(rng: random.Random, body: bytes, changes: int) -> Iterator[bytes]:
    """``body`` with other numbers, flipped bits, bytes that are missing, repeated or left over."""
    for _ in range(changes):
        at, size = rng.randrange(len(body)), rng.choice((1, 4, 8))
        number = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "big")
        yield body[:at] + number + body[at + size :]
        yield body[:at] + bytes([body[at] ^ 1 << rng.randrange(8)]) + body[at + 1 :]
        yield rng.choice((body[:at], body[:at] + body[at + size :], body[: at + size] + body[at:]))
    yield from (b"", body + b"\x00", body * 2)
    for at in range(32, min(len(body), 160), 4):  # the numbers of an offer or a plan are among these
        yield from (body[:at] + number.to_bytes(4, "big") + body[at + 4 :] for number in NUMBERS[:5])


class Native:
    """A native device of a vector before each step. Every step begins from a state that has not answered."""

    def __init__(self, case: dict[str, Any], name: str) -> None:
        self.case, self.name, self.device = case, name, devices_of(case)[name]
        self.key = IdentityKey(raw(case["identities"]["coordinator"]))
        self.states: dict[str, Any] = {}
        for step in STEPS:
            self.after = self.answer(step, raw(self.good(step)))[0]
            self.states[STEPS[step]] = self.after

    def good(self, step: str) -> str:
        """The sound message of a step."""
        found = self.case["assignments"][self.name] if step == "assignment" else self.case[step]
        return str(found)

    def answer(self, step: str, message: bytes) -> tuple[Any, bytes]:
        """The state after a step, and the answer."""
        case, name, device = self.case, self.name, self.device
        if step == "offer":
            return client.join(device, message, GivenEntropy(40 * case["join"][name]))  # some offer more rounds
        state = reopened(self.states[step])
        if step == "roster":
            return state.on_roster(device, message, GivenEntropy(case["deal"][name]))  # type: ignore[no-any-return,union-attr]
        if step == "assignment":
            vector = np.array(case["plain"][name], ring.dtype(case["spec"]["ring_bits"]))
            return state.on_plan(device, message).contribute(device, vector)  # type: ignore[no-any-return,union-attr]
        return getattr(state, f"on_{step}")(device, message)  # type: ignore[no-any-return]

    def verdict(self, step: str, message: bytes) -> dict[str, Any]:
        """The answer to a message, or what its refusal is about."""
        found: dict[str, Any] = {"step": step, "message": message.hex(), "about": None, "answer": None}
        try:
            return found | {"answer": self.answer(step, message)[1].hex()}
        except ProtocolError as error:
            return found | {"about": error.about}

    def hostile(self, rng: random.Random, changes: int) -> Iterator[dict[str, Any]]:
        """Messages of every step, and what this device makes of them."""
        for step in STEPS:
            message = raw(self.good(step))
            body = envelope.unverified_body(message)
            for other in damaged(rng, body, changes):
                signed = self.key.sign(step, other)
                yield self.verdict(step, ENVELOPE.encode(Envelope(b"EA", 1, step, other, signed)))
            for other in damaged(rng, message, changes // 8):
                yield self.verdict(step, other)


@pytest.mark.slow
def test_damaged_messages_are_answered_or_refused_as_by_a_native_device(tmp_path: Path, node: str) -> None:
    rng, made = random.Random(3), tmp_path / "hostile.json"  # noqa: S311  # not a secret
    found = {label: list(Native(CASES[label], "unit-0").hostile(rng, 40)) for label in ("narrow", "sparse")}
    each = [one for case in found.values() for one in case]
    assert all(len({one["about"] for one in each if one["step"] == step}) > 5 for step in STEPS)
    assert any(one["answer"] for one in each)
    made.write_text(json.dumps(found))
    run(node, "hostile.test.mjs", EDGEADAPT_HOSTILE=made)


# Contributions


class Drawn:
    """Fixed bytes in place of NumPy's generator: 53 bits of each word of 64 as ``random``, then ``bytes``."""

    def __init__(self, drawn: bytes) -> None:
        self.left = drawn

    def bytes(self, n: int) -> bytes:
        out, self.left = self.left[:n], self.left[n:]
        assert len(out) == n
        return out

    def random(self, size: int) -> NDArray[np.float64]:
        words = np.frombuffer(self.bytes(8 * size), "<u8")
        return np.ldexp((words >> 11).astype(np.float64), -53)


def encoded(rng: np.random.Generator, bits: int, clients: int) -> dict[str, Any]:
    """A vector of two segments, its numbers, and what a native device rounds them to."""
    segments = (Segment("delta", 300, float(rng.uniform(0.01, 50))), Segment("weight", 1, 100.0))
    spec = VectorSpec(segments, bits, clients)
    values = {each.name: rng.uniform(-each.bound, each.bound, each.size) for each in segments}
    step = spec.step(segments[0])
    values["delta"][:4] = segments[0].bound, -segments[0].bound, 3 * step, -step * (1 - 2.0**-40)
    key = rng.bytes(32)
    packed = ring.pack(spec.encode(values, Drawn(key)), bits)  # type: ignore[arg-type]
    found = {name: value.tobytes().hex() for name, value in values.items()}
    return {"vector": asdict(spec), "values": found, "key": key.hex(), "packed": packed.hex()}


def session_of(layout: Layout, bits: int, clip_norm: float = 2.0) -> SessionSpec:
    vector = contribution_spec(layout, Bounds(clip_norm=clip_norm, weight_cap=7, ring_bits=bits, max_clients=8))
    return session_spec(8, vector=vector, clip_norm=clip_norm, weight_cap=7, layout_digest=layout.digest)


def offer_of(spec: SessionSpec) -> str:
    """The body of an offer of this session to nobody."""
    return Offer(bytes(32), spec, ()).encode().hex()


def contributed_moments(rng: np.random.Generator, d: int = 6, k: int = 3) -> dict[str, Any]:
    """Moments of more examples than the weight cap, and the vector that a native device contributes with them.

    The embeddings have few bits, so that both implementations add them up exactly.
    """
    head = ClassifierHead("classifier.weight", "classifier.bias", k, d)
    vector = moment_spec(head, Bounds(clip_norm=1.0, weight_cap=7, ring_bits=22, max_clients=8))
    spec = session_spec(8, vector=vector, weight_cap=7)
    embeddings, labels = np.eye(d)[rng.integers(0, d, 9)] * [[4.0]], rng.integers(0, k, 9)
    score, drawn = Score(3, 4, 2.5), rng.bytes(32)
    found = moment_contribution(moments_of(embeddings, labels, k), score, spec, Drawn(drawn))  # type: ignore[arg-type]
    return {
        "offer": offer_of(spec),
        "embeddings": embeddings.tobytes().hex(),
        "labels": labels.tolist(),
        "d": d,
        "k": k,
        "score": asdict(score),
        "drawn": drawn.hex(),
        "packed": ring.pack(found, 22).hex(),
    }


def contributed(rng: np.random.Generator, size: int, bits: int) -> dict[str, Any]:
    """An update within the clip norm, and the vector that a native device contributes with it."""
    layout = Layout((TensorSpec("a", (size,)),))
    spec = session_of(layout, bits)
    delta = rng.normal(size=size).astype(np.float32)
    delta *= np.float32(1.9 / np.linalg.norm(delta))
    outcome = Outcome({"a": np.zeros(size, np.float32)}, {"a": delta}, 5, Score(3, 4, 2.5))
    drawn = rng.bytes(8 * size + 32)
    vector = contribution(outcome, layout, spec, raw(ADAPTER), Drawn(drawn))  # type: ignore[arg-type]
    return {
        "offer": offer_of(spec),
        "delta": delta.astype(np.float64).tobytes().hex(),
        "examples": outcome.examples,
        "score": asdict(outcome.held_out),
        "adapter": ADAPTER,
        "drawn": drawn.hex(),
        "packed": ring.pack(vector, bits).hex(),
    }


def bounds(size: int) -> list[dict[str, Any]]:
    """Offers with the vector of their clip norm and weight cap, and with others."""
    fair = session_of(Layout((TensorSpec("a", (size,)),)), 16)
    delta, *others = fair.vector.segments
    changed = [
        replace(fair, clip_norm=fair.clip_norm / 2),
        replace(fair, weight_cap=fair.weight_cap - 1),
        *(
            replace(fair, vector=replace(fair.vector, segments=segments))
            for segments in (
                (replace(delta, bound=delta.bound * (1 - 2.0**-52)), *others),
                (replace(delta, size=size + 1), *others),
                (delta, *others[:-1]),
                (delta, *others[::-1]),
                (delta, *others, replace(others[0], name="more")),
            )
        ),
    ]
    found = [{"offer": offer_of(spec), "size": size, "fair": False} for spec in changed]
    return [{"offer": offer_of(fair), "size": size, "fair": True}, *found]


def test_a_contribution_is_bit_for_bit_that_of_a_native_device(tmp_path: Path, node: str) -> None:
    rng, made = np.random.default_rng(5), tmp_path / "made.json"
    content = {
        "encoded": [encoded(rng, bits, clients) for bits in (12, 16, 19, 24, 32) for clients in (3, 12)],
        "moments": contributed_moments(rng),
        "contributions": [contributed(rng, size, bits) for size in (1, 7, 64, 1000) for bits in (16, 22)],
        "bounds": bounds(1000),
    }
    made.write_text(json.dumps(content))
    run(node, "contribution.test.mjs", EDGEADAPT_CONTRIBUTIONS=made)


# Revocation lists, and histories of plans and sums

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def millis(at: datetime) -> int:
    return int(1000 * at.timestamp())


def odd_lists(authority: Authority) -> Iterator[bytes]:
    """Lists that the authority signs although ``revocations`` would refuse to."""
    name = x509.load_der_x509_certificate(authority.der).subject
    key = Ed25519PrivateKey.from_private_bytes(authority.key.raw)
    plain = x509.CertificateRevocationListBuilder(name, BEGIN, BEGIN + DAY)
    numbered = plain.add_extension(x509.CRLNumber(5), critical=False)
    entry = x509.RevokedCertificateBuilder(7, BEGIN)
    issuer = x509.CertificateIssuer([x509.DirectoryName(name)])
    builders = (
        plain,
        numbered.add_extension(x509.DeltaCRLIndicator(4), critical=True),
        numbered.add_extension(x509.AuthorityKeyIdentifier(b"id", None, None), critical=False),
        numbered.add_revoked_certificate(entry.add_extension(issuer, critical=True).build()),
        numbered.add_revoked_certificate(entry.add_extension(x509.InvalidityDate(BEGIN), critical=False).build()),
    )
    for builder in builders:
        yield builder.sign(key, None).public_bytes(serialization.Encoding.DER)


def read_list(root: Root, raw_list: bytes) -> dict[str, Any]:
    """A list, or what a native device's refusal of it is about."""
    found: dict[str, Any] = {"list": raw_list.hex(), "refused": None}
    try:
        read = root.revocations(raw_list)
    except TrustError as error:
        return found | {"refused": error.about}
    ends = millis(read.next_update)
    return found | {"number": str(read.number), "serials": [str(each) for each in read.revoked], "ends": ends}


def revocations(rng: random.Random) -> dict[str, Any]:
    entropy = CountedEntropy(3)
    authority = Authority.create("lists", entropy, BEGIN, BEGIN + 900 * DAY)
    stranger = Authority.create("lists", entropy, BEGIN, BEGIN + 900 * DAY)
    public = IdentityKey.generate(entropy).public
    certificate = authority.issue("unit-0", public, not_before=BEGIN, not_after=BEGIN + DAY, serial=2**159 - 1)
    revoked = {7: Revocation(BEGIN, Reason.KEY_COMPROMISE), 2**159 - 1: Revocation(BEGIN + DAY)}
    two = [authority.revocations(n, given, BEGIN, BEGIN + 30 * DAY).der for n, given in ((1, {}), (2, revoked))]
    exact = [*two, stranger.revocations(3, {}, BEGIN, BEGIN + DAY).der, *odd_lists(authority)]
    harmed = [b"", *(two[1][:at] for at in range(0, len(two[1]), 9))]
    for _ in range(200):
        at = rng.randrange(len(two[1]))
        harmed.append(two[1][:at] + bytes([two[1][at] ^ 1 << rng.randrange(8)]) + two[1][at + 1 :])
    return {
        "root": authority.der.hex(),
        "certificate": certificate.hex(),
        "lists": [read_list(authority.root, each) for each in (*exact, *harmed)],
        "exact": [each.hex() for each in exact],
        "two": [each.hex() for each in two],
        "fresh": [fresh(authority, days, days_ago) for days in (0, 3) for days_ago in (None, -2, 0, 2, 4, 31)],
    }


def fresh(authority: Authority, days: int, days_ago: int | None) -> dict[str, Any]:
    """Whether a native device relies on a list of that age, or on none."""
    at, policy = BEGIN + 100 * DAY, Policy(revocation_days=days)
    found: dict[str, Any] = {"updates": None, "days": days, "at": millis(at), "refused": None}
    listed = None
    if days_ago is not None:
        listed = authority.revocations(1, {}, at - days_ago * DAY, at - days_ago * DAY + 30 * DAY)
        found["updates"] = [millis(listed.this_update), millis(listed.next_update)]
    try:
        policy.check_revocations(listed, at)
    except ProtocolError as error:
        found["refused"] = error.about
    return found


def history(rng: random.Random) -> dict[str, Any]:
    """Plans and sums as a hostile coordinator may send them, and what a native device's refusals are about."""
    known, repeats, events = None, rng.randrange(3), []
    adapters = [bytes([number]).hex() * 32 for number in range(3)]
    serials = {f"unit-{number}": 100 + number for number in range(4)}
    for _ in range(12):
        version, digest, training = rng.choice((1, 1, 2, 3)), rng.choice(adapters), rng.choice((b"", b"", b"x"))
        plan = Plan(bytes(32), 1, ("a", "b"), version, digest, training, rng.choice(((), (), ("c",))))
        spec = session_spec(4, clip_norm=rng.choice((4.0, 4.0, 2.0)), grouping=rng.choice((None, Grouping(2, 2))))
        event: dict[str, Any] = {"body": plan.encode().hex(), "offer": offer_of(spec)}
        event |= {"survivors": None, "revoked": rng.choice(([], [], [103])), "refused": None}
        try:
            if rng.randrange(2):
                known = adapterstate.on_plan(known, plan, spec, repeats)
            else:
                event["survivors"] = dict(list(serials.items())[: rng.choice((4, 4, 3))])
                known = adapterstate.on_survivors(known, plan, spec, event["survivors"], event["revoked"])
        except ProtocolError as error:
            event["refused"] = error.about
        events.append(event)
    return {"repeats": repeats, "events": events}


def test_revocation_lists_and_adapter_states_are_those_of_a_native_device(tmp_path: Path, node: str) -> None:
    rng, made = random.Random(9), tmp_path / "history.json"  # noqa: S311  # not a secret
    histories = [history(rng) for _ in range(400)]
    abouts = {event["refused"] for each in histories for event in each["events"]}
    assert len(abouts) == 8, abouts  # every refusal occurs, and none
    made.write_text(json.dumps({**revocations(rng), "histories": histories}))
    run(node, "history.test.mjs", EDGEADAPT_HISTORY=made)


# Proofs about the log


class Recorder:
    """Records what native log states make of what they are given."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []

    def index(self, state: LogState) -> int:
        written = {name: plain(value) for name, value in asdict(state).items()}
        if written not in self.states:
            self.states.append(written)
        return self.states.index(written)

    def wrapped(self, method: str) -> Callable[..., Any]:
        """The method, with a record of each call that is not made by another one."""
        native = getattr(LogState, method)

        def call(*given: Any, **named: Any) -> LogState:
            own = () if method == "initial" else given[:1]
            record = {"method": method, "state": self.index(own[0]) if own else None, "after": None, "about": None}
            record["given"] = [plain(each) for each in (*given[len(own) :], *named.values())]
            self.calls.append(record)
            depth = len(self.calls)
            try:
                after = native(*given, **named)
            except ProtocolError as error:
                record["about"] = error.about
                raise
            finally:
                del self.calls[depth:]
            record["after"] = self.index(after)
            return after  # type: ignore[no-any-return]

        return staticmethod(call) if method == "initial" else call  # type: ignore[return-value]


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, PublicKey):
        return value.raw.hex()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, int):
        return str(value)
    return value if value is None or isinstance(value, str) else [plain(each) for each in value]


def test_proofs_about_the_log_are_judged_as_by_a_native_device(
    tmp_path: Path, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the native device's own tests, and damaged ones."""
    recorder, rng, made = Recorder(), random.Random(4), tmp_path / "proofs.json"  # noqa: S311  # not a secret
    for method in ("initial", "on_receipt", "on_session_chain_proof", "contributed", "on_survivors"):
        monkeypatch.setattr(LogState, method, recorder.wrapped(method))
    for name, check in vars(test_logstate).items():
        marks = getattr(check, "pytestmark", [])
        if name.startswith("test_") and not hasattr(check, "hypothesis"):
            for given in marks[0].args[1] if marks else [None]:
                check(given) if marks else check()
    logged, closed = chain(3)
    receipt, proof = log_of(3).receipt(), chain_proof(logged, closed)
    for other in damaged(rng, receipt, 40):
        with suppress(ProtocolError):
            seen(3).on_receipt(KEY.public, other)
    for other in damaged(rng, proof, 40):
        with suppress(ProtocolError):
            seen(2).on_session_chain_proof(KEY.public, other, OFFERS[3])
    assert len({call["about"] for call in recorder.calls}) > 18
    calls = list({json.dumps(call): call for call in recorder.calls}.values())
    made.write_text(json.dumps({"states": recorder.states, "calls": calls}))
    run(node, "logstate.test.mjs", EDGEADAPT_PROOFS=made)


def test_a_page_answers_requests_whose_fields_come_in_parts(tmp_path: Path, node: str) -> None:
    fields = {
        "body": b"b",
        "adapter": bytes(at % 251 for at in range(300_000)),
        "other": bytes(at % 13 for at in range(70_000)),
    }
    challenge = gateway.CHALLENGE.encode(gateway.GatewayChallenge(bytes(32)))
    asked = [challenge, gateway.ADMITTED, *gateway.request_messages(7, "plan", fields)]
    certificate = bytes(range(200))
    hello = gateway.DeviceHello(certificate, "fleet.example", bytes(64), version("edgeadapt"), 1_770_000_000)
    parts = (asked, [certificate], [gateway.HELLO.encode(hello)])
    made = tmp_path / "conversation.json"
    made.write_text(json.dumps([[each.hex() for each in part] for part in parts]))
    run(node, "websocket.test.mjs", EDGEADAPT_CONVERSATION=made)
