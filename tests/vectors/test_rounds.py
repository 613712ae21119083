"""Whole rounds, byte for byte as an independent script (make_rounds.py) made them, and spoiled copies of messages."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation import clientside, ring, serverside
from aggregation.certificates import Root
from aggregation.clientside import Device
from aggregation.errors import ProtocolError
from aggregation.identity import IdentityKey
from aggregation.messages import MESSAGES, Message
from aggregation.policy import Policy
from aggregation.serverside import RoundAborted
from aggregation.spec import Adversary, SessionSpec
from aggregation.vector import Segment, VectorSpec

CASES: dict[str, Any] = json.loads(Path(__file__).with_name("rounds.json").read_text())
raw = bytes.fromhex


class Given:
    """Entropy that gives what the vector says, all of it and no more."""

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
    t, digest = given["threshold"], given["digest"]
    adversary = Adversary.ACTIVE
    return SessionSpec(given["rounds"], t, t, given["degree"], vector, 2.5, 7, "none", digest, digest, adversary)


def devices_of(case: dict[str, Any]) -> dict[str, Device]:
    base, coordinator = case["spec"]["digest"], IdentityKey(raw(case["identities"]["coordinator"])).public
    policy = Policy(
        known_bases=frozenset({base}), minimum_cohort=3, minimum_ring_bits=8, corrupt_fraction=0, complete_up_to=3
    )
    root = Root(raw(case["root"]))
    return {
        name: Device(IdentityKey(raw(case["identities"][name])), raw(der), root, coordinator, policy)
        for name, der in case["certificates"].items()
    }


def test_a_round_is_byte_for_byte_what_the_independent_script_made(case: dict[str, Any]) -> None:
    devices, spec = devices_of(case), spec_of(case)
    key, root = IdentityKey(raw(case["identities"]["coordinator"])), Root(raw(case["root"]))
    certificates = {name: device.certificate for name, device in devices.items()}
    server: Any
    server, offer = serverside.open_session(key, root, spec, certificates, Given(case["session"]))
    assert offer.hex() == case["offer"]
    states: dict[str, Any] = {}
    for name, device in devices.items():
        entropy = Given(case["join"][name])
        states[name], advert = clientside.join(device, offer, entropy)
        assert (advert.hex(), entropy.left) == (case["adverts"][name], b"")
        server = server.on_advert(name, advert)
    server, roster = server.close()
    assert roster.hex() == case["roster"]
    for name, device in devices.items():
        entropy = Given(case["deal"][name])
        states[name], shares = states[name].on_roster(device, roster, entropy)
        assert (shares.hex(), entropy.left) == (case["shares"][name], b"")
        server = server.on_shares(name, shares)
    established = server.close()
    assert established.session.context.hex() == case["context"]
    for name, near in case["near"].items():
        assert list(established.session.neighbours(name, established.devices)) == near
    finish(case, devices, states, established)


def finish(case: dict[str, Any], devices: dict[str, Device], states: dict[str, Any], established: Any) -> None:
    digest, bits = case["spec"]["digest"], case["spec"]["ring_bits"]
    server: Any
    server, plans = established.plan(adapter_version=3, adapter_digest=digest, training=b"train", cohort=None)
    assert server.plan.digest().hex() == case["plan_digest"]
    assert {name: body.hex() for name, body in plans.items()} == case["assignments"]
    for name, device in devices.items():
        vector = np.array(case["plain"][name], ring.dtype(bits))
        states[name], masked = states[name].on_plan(device, plans[name]).contribute(device, vector)
        assert masked.hex() == case["masked"][name]
        if name != case["lost"]:
            server = server.on_masked_input(name, masked)
    server, bodies = server.close()
    assert {body.hex() for body in bodies.values()} == {case["survivors"]}
    for name, body in bodies.items():
        if name != case["silent"]:
            states[name], agreement = states[name].on_survivors(devices[name], body)
            assert agreement.hex() == case["agreements"][name]
            server = server.on_signature(name, agreement)
    server, bodies = server.close()
    assert {name: body.hex() for name, body in bodies.items()} == case["unmask"]
    for name, body in bodies.items():
        states[name], opening = states[name].on_unmask(devices[name], body)
        assert opening.hex() == case["openings"][name]
        server = server.on_unmask(name, opening)
    ended = server.close()
    assert not isinstance(ended, RoundAborted)
    assert np.array_equal(server.opened.total & np.uint32(2**bits - 1), np.array(case["total"], np.uint32))
    assert ended[1].digest.hex() == case["total_digest"]
    assert ended[1].dropped == (case["lost"],)


# Negative vectors: what is nearly a message is none. Each body is cut out of its envelope in the frozen round.

BODIES: dict[str, str] = {
    "offer": CASES["sparse"]["offer"],
    "advert": CASES["sparse"]["adverts"]["unit-0"],
    "roster": CASES["sparse"]["roster"],
    "shares": CASES["sparse"]["shares"]["unit-0"],
    "assignment": CASES["sparse"]["assignments"]["unit-0"],
    "survivors": CASES["sparse"]["survivors"],
    "agreement": CASES["sparse"]["agreements"]["unit-0"],
    "unmask": CASES["sparse"]["unmask"]["unit-0"],
    "opening": CASES["sparse"]["openings"]["unit-0"],
}
KINDS: dict[str, type[Message]] = {kind.TAG: kind for kind in MESSAGES}


def body_of(tag: str) -> bytes:
    start = 2 + 1 + 1 + len(tag) + 4  # magic, version, tag, length
    return raw(BODIES[tag])[start:-64]


@pytest.mark.parametrize("tag", BODIES)
def test_a_frozen_body_is_read_and_written_again(tag: str) -> None:
    assert KINDS[tag].decode(body_of(tag)).encode() == body_of(tag)


@pytest.mark.parametrize("tag", BODIES)
def test_a_frozen_body_cut_or_lengthened_anywhere_is_refused(tag: str) -> None:
    body = body_of(tag)
    for end in {*range(0, len(body), max(1, len(body) // 200)), len(body) - 1}:
        with pytest.raises(ProtocolError):
            KINDS[tag].decode(body[:end])
    with pytest.raises(ProtocolError, match="left over"):
        KINDS[tag].decode(body + b"\x00")


@pytest.mark.parametrize("case_name", sorted(CASES))
def test_an_envelope_of_another_magic_version_tag_or_signer_is_refused(case_name: str) -> None:
    case = CASES[case_name]
    name, device = next(iter(devices_of(case).items()))
    offer = bytearray(raw(case["offer"]))
    assert clientside.join(device, bytes(offer), Given(case["join"][name]))
    for place in (0, 2, 4, len(offer) - 1):  # magic, version, tag, signature
        spoiled = bytes(offer[:place]) + bytes([offer[place] ^ 1]) + bytes(offer[place + 1 :])
        with pytest.raises(ProtocolError):
            clientside.join(device, spoiled, Given(case["join"][name]))
    stranger = dataclasses.replace(device, coordinator=device.identity.public)
    with pytest.raises(ProtocolError, match="not valid"):
        clientside.join(stranger, bytes(offer), Given(case["join"][name]))
