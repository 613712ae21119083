"""Complete rounds, byte for byte as an independent script (make_rounds.py) made them, and damaged messages."""

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation import checks, client, envelope, ring, server
from aggregation.client import Device
from aggregation.errors import ProtocolError
from aggregation.messages import MESSAGES, Challenge, CheckIn, Message
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey
from aggregation.policy import Policy
from aggregation.server import Coordinator, RoundAborted
from aggregation.spec import Adversary, Grouping, SessionSpec
from aggregation.vector import Segment, VectorSpec
from tests.support import refused

CASES: dict[str, Any] = json.loads(Path(__file__).with_name("rounds.json").read_text())
raw = bytes.fromhex
NOW = datetime(2027, 1, 1, tzinfo=UTC)
ABOUT: dict[tuple[str, str], str] = {  # step and what is wrong → what the refusal is about
    ("challenge", "for another node"): "challenge.node",
    ("challenge", "signed by a device"): "signature",
    ("check-in", "for the challenge of another node"): "check-in.challenge",
    ("check-in", "for another nonce"): "check-in.challenge",
    ("check-in", "another device's certificate"): "signature",
    ("offer", "two groups can reconstruct a secret"): "offer.",  # threshold or graph
    ("offer", "two groups can sign different survivor sets"): "offer.quorum",
    ("offer", "signed by a device"): "signature",
    ("offer", "a trailing byte"): "encoding.trailing",
    ("offer", "certificates out of order"): "offer.order",
    ("offer", "a repeated device"): "offer.order",
    ("offer", "a negative zero"): "encoding.real",
    ("advert", "another device's"): "signature",
    ("advert", "for another offer"): "advert.offer",
    ("advert", "a key of small order"): "x25519.order",
    ("roster", "without the device's own advert"): "roster.self",
    ("roster", "a repeated advert"): "roster.order",
    ("roster", "an advert signed by the coordinator"): "signature",
    ("roster", "too few adverts"): "roster.size",
    ("shares", "no shares for a neighbor"): "shares.holders",
    ("shares", "of another session"): "shares.context",
    ("assignment", "a round beyond the session"): "plan.round",
    ("assignment", "round zero"): "plan.round",
    ("assignment", "without the device"): "plan.self",
    ("assignment", "members out of order"): "plan.order",
    ("assignment", "too few members"): "plan.size",
    ("assignment", "of another session"): "plan.context",
    ("assignment", "a former member that is a member"): "plan.former",
    ("assignment", "a group of one"): "plan.group",
    ("masked-input", "for another plan"): "masked-input.plan",
    ("masked-input", "too long"): "masked-input.size",
    ("masked-input", "another vector than the signed one"): "masked-input.vector",
    ("masked-input", "an unused bit set"): "vector.unused-bits",
    ("survivors", "for another plan"): "survivors.plan",
    ("survivors", "without the device"): "survivors.self",
    ("survivors", "with another vector of the device"): "survivors.self",
    ("survivors", "with a stranger"): "survivors.members",
    ("survivors", "too few"): "survivors.size",
    ("survivors", "out of order"): "encoding.order",
    ("unmask", "one signature too few"): "unmask.quorum",
    ("unmask", "a signature of zeros"): "signature",
    ("unmask", "a signature of another device"): "signature",
    ("unmask", "a signature of a dropout"): "unmask.signers",
    ("unmask-response", "for another survivor set"): "unmask-response.survivors",
    ("unmask-response", "a share of the other kind"): "unmask-response.shares",
}


class GivenEntropy:
    """Entropy that returns the bytes of the vector, in order."""

    def __init__(self, given: str) -> None:
        self.left = raw(given)

    def bytes(self, n: int) -> bytes:
        assert n <= len(self.left)
        out, self.left = self.left[:n], self.left[n:]
        return out


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]  # type: ignore[no-any-return]


def spec_of(case: dict[str, Any]) -> SessionSpec:
    given, devices = case["spec"], len(case["certificates"])
    vector = VectorSpec((Segment("delta", given["size"], 1.0),), given["ring_bits"], devices)
    return SessionSpec(
        rounds=given["rounds"],
        threshold=given["threshold"],
        minimum_survivors=given["minimum_survivors"],
        degree=given["degree"],
        vector=vector,
        clip_norm=2.5,
        weight_cap=7,
        privacy=None,
        base_digest=given["digest"],
        layout_digest=given["digest"],
        adversary=Adversary.ACTIVE,
        grouping=Grouping(given["groups"], 2) if given["groups"] > 1 else None,
    )


def devices_of(case: dict[str, Any]) -> dict[str, Device]:
    base, coordinator = case["spec"]["digest"], IdentityKey(raw(case["identities"]["coordinator"])).public
    policy = Policy(
        known_bases=frozenset({base}),
        minimum_cohort=3,
        minimum_survivors=2,
        minimum_ring_bits=8,
        corrupt_fraction=0,
        complete_up_to=3,
    )
    root = Root(raw(case["root"]))
    return {
        name: Device(IdentityKey(raw(case["identities"][name])), raw(der), root, coordinator, policy)
        for name, der in case["certificates"].items()
    }


@dataclasses.dataclass(slots=True)
class Walk:
    """A session step by step. Before each message it delivers the invalid ones of the vector, which must be refused."""

    case: dict[str, Any]
    devices: dict[str, Device] = dataclasses.field(init=False)
    states: dict[str, Any] = dataclasses.field(default_factory=dict)
    server: Any = None
    about: dict[str, str] = dataclasses.field(default_factory=dict)  # refused message → what the refusal is about

    def __post_init__(self) -> None:
        self.devices = devices_of(self.case)

    def deliver(self, step: str, name: str, call: Callable[[bytes], Any], body: bytes) -> Any:
        for bad in self.case["refused"]:
            if (bad["step"], bad["device"]) == (step, name):
                with pytest.raises(ProtocolError) as caught:
                    call(raw(bad["message"]))
                assert caught.value.about.startswith(ABOUT[step, bad["why"]])
                self.about[bad["message"]] = caught.value.about
        return call(body)

    def accept(self, step: str, method: str, name: str, body: bytes) -> None:
        self.server = self.deliver(step, name, lambda given: getattr(self.server, method)(name, given), body)

    def ask(self, step: str, method: str, name: str, body: bytes) -> str:
        state, device = self.states[name], self.devices[name]
        self.states[name], answer = self.deliver(step, name, lambda given: getattr(state, method)(device, given), body)
        return answer.hex()  # type: ignore[no-any-return]

    def establish(self) -> None:
        case = self.case
        key, root = IdentityKey(raw(case["identities"]["coordinator"])), Root(raw(case["root"]))
        certificates = {name: self.check_in(node, name, root) for node, name in enumerate(self.devices, 1)}
        self.server, offer = server.open_session(
            Coordinator(key), root, spec_of(case), certificates, GivenEntropy(case["session"])
        )
        assert offer.hex() == case["offer"]
        for name in self.devices:
            self.join(name, offer)
        self.server, roster = self.server.close()
        assert roster.hex() == case["roster"]
        for name in self.devices:
            self.share(name, roster)
        self.server = self.server.close()

    def check_in(self, node: int, name: str, root: Root) -> bytes:
        device, challenge = self.devices[name], raw(self.case["challenges"][name])
        key, certificate, coordinator = device.identity, device.certificate, device.coordinator
        asked, own = Challenge.decode(envelope.unverified_body(challenge)), raw(self.case["check_ins"][name])
        last = CheckIn.decode(envelope.unverified_body(own)).last_offer
        answer = self.deliver(
            "challenge",
            name,
            lambda body: client.check_in(key, certificate, coordinator, body, node=node, last_offer=last),
            challenge,
        )
        assert answer.hex() == self.case["check_ins"][name]
        who, message = self.deliver("check-in", name, lambda body: checks.check_in(root, asked, body, NOW), answer)
        assert (who, message.last_offer is None) == (name, node == 1)
        return message.certificate  # type: ignore[no-any-return]

    def join(self, name: str, offer: bytes) -> None:
        device, entropy = self.devices[name], GivenEntropy(self.case["join"][name])
        call = lambda body: client.join(device, body, entropy)  # noqa: E731
        self.states[name], advert = self.deliver("offer", name, call, offer)
        assert (advert.hex(), entropy.left) == (self.case["adverts"][name], b"")
        self.accept("advert", "on_advert", name, advert)

    def share(self, name: str, roster: bytes) -> None:
        state, device, entropy = self.states[name], self.devices[name], GivenEntropy(self.case["deal"][name])
        call = lambda body: state.on_roster(device, body, entropy)  # noqa: E731
        self.states[name], shares = self.deliver("roster", name, call, roster)
        assert (shares.hex(), entropy.left) == (self.case["shares"][name], b"")
        self.accept("shares", "on_shares", name, shares)

    def collect(self) -> dict[str, bytes]:
        case, digest = self.case, self.case["spec"]["digest"]
        self.server, plans = self.server.plan(adapter_version=3, adapter_digest=digest, training=b"train", cohort=None)
        assert self.server.plan.digest().hex() == case["plan_digest"]
        assert {name: body.hex() for name, body in plans.items()} == case["assignments"]
        for name in self.devices:
            masked = self.contribute(name, plans[name])
            if name not in case["dropouts"]:
                self.accept("masked-input", "on_masked_input", name, masked)
        self.server, bodies = self.server.close()
        assert {body.hex() for body in bodies.values()} == {case["survivors"]}
        return bodies  # type: ignore[no-any-return]

    def contribute(self, name: str, plan: bytes) -> bytes:
        state, device = self.states[name], self.devices[name]
        planned = self.deliver("assignment", name, lambda body: state.on_plan(device, body), plan)
        vector = np.array(self.case["plain"][name], ring.dtype(self.case["spec"]["ring_bits"]))
        self.states[name], masked = planned.contribute(device, vector)
        assert masked.hex() == self.case["masked"][name]
        return masked  # type: ignore[no-any-return]

    def open(self, bodies: dict[str, bytes]) -> Any:
        case = self.case
        for name, body in bodies.items():
            if name not in case["silent"]:
                signature = self.ask("survivors", "on_survivors", name, body)
                assert signature == case["consistency_signatures"][name]
                self.accept("consistency-signature", "on_consistency_signature", name, raw(signature))
        self.server, bodies = self.server.close()
        assert {body.hex() for body in bodies.values()} == {case["unmask"]}
        assert set(bodies) == set(case["unmask_responses"])
        for name, body in bodies.items():
            response = self.ask("unmask", "on_unmask", name, body)
            assert response == case["unmask_responses"][name]
            self.accept("unmask-response", "on_unmask_response", name, raw(response))
        return self.server.close()


def test_a_round_is_byte_for_byte_that_of_the_independent_script(case: dict[str, Any]) -> None:
    walk = Walk(case)
    walk.establish()
    session = walk.server.session
    assert session.context.hex() == case["context"]
    assert {name: list(session.neighbors(name, session.peers)) for name in session.peers} == case["neighbors"]
    ended = walk.open(walk.collect())
    assert not isinstance(ended, RoundAborted)
    used = 2 ** case["spec"]["ring_bits"] - 1
    assert [(total & used).tolist() for total in walk.server.survivor_set.totals] == case["totals"]
    assert ended[1].digest.hex() == case["total_digest"]
    assert ended[1].dropped == tuple(case["dropouts"])
    assert walk.about.keys() == {
        bad["message"] for bad in case["refused"]
    }  # every invalid message was delivered, and none had an effect


def test_the_vectors_have_dropouts_on_both_graphs_and_bad_messages_at_every_step() -> None:
    sparse = {name: case["spec"]["degree"] < len(case["certificates"]) - 1 for name, case in CASES.items()}
    assert {sparse[name] for name, case in CASES.items() if case["dropouts"] and case["silent"]} == {True, False}
    for case in CASES.values():
        assert {bad["step"] for bad in case["refused"]} == {step for step, _ in ABOUT}
    assert {(bad["step"], bad["why"]) for case in CASES.values() for bad in case["refused"]} == set(ABOUT)


# Bytes that are almost a message are refused. Each body is taken from its envelope in the frozen round.

BODIES: dict[str, str] = {
    "challenge": CASES["sparse"]["challenges"]["unit-1"],
    "check-in": CASES["sparse"]["check_ins"]["unit-1"],
    "offer": CASES["sparse"]["offer"],
    "advert": CASES["sparse"]["adverts"]["unit-0"],
    "roster": CASES["sparse"]["roster"],
    "shares": CASES["sparse"]["shares"]["unit-0"],
    "assignment": CASES["sparse"]["assignments"]["unit-0"],
    "survivors": CASES["sparse"]["survivors"],
    "consistency-signature": CASES["sparse"]["consistency_signatures"]["unit-0"],
    "unmask": CASES["sparse"]["unmask"],
    "unmask-response": CASES["sparse"]["unmask_responses"]["unit-0"],
}
KINDS: dict[str, type[Message]] = {kind.TAG: kind for kind in MESSAGES}


def body_of(tag: str) -> bytes:
    start = 2 + 1 + 1 + len(tag) + 4  # magic, version, tag, length
    return raw(BODIES[tag])[start:-64]


@pytest.mark.parametrize("tag", BODIES)
def test_a_frozen_body_round_trips(tag: str) -> None:
    assert KINDS[tag].decode(body_of(tag)).encode() == body_of(tag)


@pytest.mark.parametrize("tag", BODIES)
def test_a_frozen_body_cut_or_lengthened_anywhere_is_refused(tag: str) -> None:
    body = body_of(tag)
    for end in {*range(0, len(body), max(1, len(body) // 200)), len(body) - 1}:
        with pytest.raises(ProtocolError):
            KINDS[tag].decode(body[:end])
    with refused(ProtocolError, "encoding.trailing", value=1):
        KINDS[tag].decode(body + b"\x00")


@pytest.mark.parametrize("case_name", sorted(CASES))
def test_an_envelope_of_another_magic_version_tag_or_signer_is_refused(case_name: str) -> None:
    case = CASES[case_name]
    name, device = next(iter(devices_of(case).items()))
    offer = bytearray(raw(case["offer"]))
    assert client.join(device, bytes(offer), GivenEntropy(case["join"][name]))
    for place in (0, 2, 4, len(offer) - 1):  # magic, version, tag, signature
        damaged = bytes(offer[:place]) + bytes([offer[place] ^ 1]) + bytes(offer[place + 1 :])
        with pytest.raises(ProtocolError):
            client.join(device, damaged, GivenEntropy(case["join"][name]))
    stranger = dataclasses.replace(device, coordinator=device.identity.public)
    with refused(ProtocolError, "signature", peer="coordinator", value="offer"):
        client.join(stranger, bytes(offer), GivenEntropy(case["join"][name]))
