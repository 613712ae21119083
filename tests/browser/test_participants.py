"""Sessions of one coordinator with devices in Python and devices in JavaScript, which run in a program of their own."""

import base64
import json
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregation import envelope
from aggregation.messages import Assignment, Challenge, Offer, Roster, Survivors, Unmask
from aggregation.pki import Revocation
from aggregation.pki.certificates import serial
from aggregation.pki.identity import PublicKey
from aggregation.policy import Policy
from aggregation.privacy.accounting import Mechanism
from aggregation.server import AbortReason, Established, RoundAborted
from aggregation.spec import Adversary, Grouping, Privacy
from aggregation.steps import Step
from aggregation.vector import Segment, VectorSpec
from client.node import privacyledger
from client.node.privacyledger import PrivacyLedger
from edgeadapt.formats import files
from tests.browser.test_aggregation import JS
from tests.client.node.test_adapterstate import TASK, adapter
from tests.support import programs
from tests.support.fleet import BASE, BEGIN, END, Fleet, make_fleet, session_spec, vector_spec

POLICY = {
    "demand_proofs": False,
    "known_bases": [BASE],
    "minimum_cohort": 3,
    "minimum_survivors": 2,
    "minimum_ring_bits": 8,
}
ASKS = {"on_survivors": Step.SURVIVORS, "on_unmask": Step.UNMASK}
BLOBS = {files.sha256(blob): blob for blob in (files.encode(adapter(number)) for number in range(8))}  # far apart


class RefusedError(Exception):
    """A device in JavaScript refused a message: the class of its error, and what it is about."""

    def __init__(self, given: Mapping[str, str]) -> None:
        super().__init__(given["message"])
        self.name, self.about = given["name"], given["about"]


class Program:
    """Devices in JavaScript (``js/aggregation/participants.mjs``)."""

    def __init__(self) -> None:
        command = [programs.node(), str(JS / "participants.mjs")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, action: str, device: str, **given: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin
        assert process.stdout
        fields = {name: encoded(value) for name, value in given.items()}
        process.stdin.write(json.dumps({"action": action, "device": device, **fields}) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        return answer

    def answer(self, device: str, step: Step, body: bytes, **fields: bytes) -> bytes:
        """A device's answer to a message of the coordinator."""
        return base64.b64decode(self.ask("answer", device, step=step.value, body=body, **fields)["body"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def encoded(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


@dataclass(slots=True)
class MixedFleet(Fleet):
    """A fleet of which the devices ``scripted`` are in JavaScript.

    All numbers are multiples of the step, so that sums are exact.
    """

    scripted: frozenset[str] = frozenset()
    program: Any = field(default=None, repr=False)

    def begin(self, session: Established, cohort: Collection[str] | None = None) -> Any:
        """The plan of a round from an adapter of its own: devices help to sums from one adapter over one set."""
        digest = list(BLOBS)[session.last_round]
        return session.plan(
            adapter_version=1 + session.last_round, adapter_digest=digest, training=TASK.encode(), cohort=cohort
        )

    def join(self, name: str, offer: bytes) -> bytes:
        return self._asked(name, Step.OFFER, offer) if name in self.scripted else Fleet.join(self, name, offer)

    def share(self, name: str, roster: bytes) -> bytes:
        return self._asked(name, Step.ROSTER, roster) if name in self.scripted else Fleet.share(self, name, roster)

    def contribute(self, name: str, plan: bytes) -> bytes:
        if name not in self.scripted:
            return Fleet.contribute(self, name, plan)
        values = {segment: numbers.tolist() for segment, numbers in self.values(name).items()}
        self.program.ask("train", name, values=values)
        digest = Assignment.decode(envelope.unverified_body(plan)).plan.adapter_digest
        return self._asked(name, Step.PLAN, plan, adapter=BLOBS[digest])

    def answer(self, method: str, name: str, body: bytes) -> bytes:
        if name in self.scripted:
            return self._asked(name, ASKS[method], body)
        return Fleet.answer(self, method, name, body)

    def values(self, name: str) -> dict[str, NDArray[np.float64]]:
        found = Fleet.values(self, name)
        for segment in self.spec.vector.segments:
            step = self.spec.vector.step(segment)
            found[segment.name] = np.trunc(found[segment.name] / step) * step
        return found

    def assert_exact(self, result: Any, survivors: Collection[str]) -> None:
        assert result.survivors == tuple(sorted(survivors))
        for segment in self.spec.vector.segments:
            plain = np.sum([self.plain[name][segment.name] for name in survivors], axis=0)
            assert np.array_equal(result.values[segment.name], plain)

    def _asked(self, name: str, step: Step, body: bytes, **fields: bytes) -> bytes:
        answer: bytes = self.program.answer(name, step, body, **fields)
        return answer


def native(given: Mapping[str, Any]) -> Policy:
    """The policy of a native device with the same limits."""
    sets = {
        "known_bases": frozenset(given["known_bases"]),
        "adversaries": frozenset(map(Adversary, given["adversaries"])),
    }
    return Policy(**{**given, **sets})


@pytest.fixture
def program() -> Iterator[Program]:
    running = Program()
    yield running
    running.close()


Mixed = Callable[..., MixedFleet]


@pytest.fixture
def mixed(program: Program) -> Mixed:
    """Make a fleet of so many devices, those with the given numbers in JavaScript."""

    def make(
        devices: int, scripted: Collection[int], limits: Mapping[str, Any] | None = None, **changes: Any
    ) -> MixedFleet:
        given = {**POLICY, "adversaries": [model.value for model in Adversary], **(limits or {})}
        fleet = make_fleet(devices, spec=session_spec(devices, **changes), policy=native(given))
        root, coordinator = fleet.authority.root.der, fleet.key.public.raw
        names = frozenset(f"device-{number:03d}" for number in scripted)
        for name in names:
            key = PublicKey(base64.b64decode(program.ask("generate", name)["key"]))
            certificate = fleet.authority.issue(name, key, not_before=BEGIN, not_after=END)
            program.ask("enrol", name, certificate=certificate, root=root, coordinator=coordinator, policy=given)
            fleet.devices[name] = replace(fleet.devices[name], certificate=certificate)
        kept = {name: getattr(fleet, name) for name in ("spec", "entropy", "authority", "key", "devices")}
        return MixedFleet(**kept, scripted=names, program=program)

    return make


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_a_session_of_both_kinds_of_devices_has_exact_sums(mixed: Mixed, bits: int) -> None:
    fleet = mixed(8, {1, 4}, vector=vector_spec(8, size=1000, bits=bits))
    session = fleet.establish()
    everyone = set(fleet.devices)
    for dropouts in ({}, {"input": ["device-001"]}, {"input": ["device-002"], "unmask": ["device-004"]}):
        session, result = fleet.round(session, dropouts)
        fleet.assert_exact(result, everyone - set(dropouts.get("input", ())))


def test_a_session_on_a_sparse_graph_has_exact_sums(mixed: Mixed) -> None:
    spec = {"degree": 4, "threshold": 4, "minimum_survivors": 7, "vector": vector_spec(11, bits=20)}
    fleet = mixed(11, range(0, 11, 2), {"complete_up_to": 3, "corrupt_fraction": 0.0}, **spec)
    _, result = fleet.round(fleet.establish(), {"input": ["device-003"]})
    fleet.assert_exact(result, set(fleet.devices) - {"device-003"})


def test_a_session_with_groups_has_an_exact_sum_of_each(mixed: Mixed) -> None:
    fleet = mixed(8, {1, 4}, grouping=Grouping(2, 3))
    _, result = fleet.round(fleet.establish(), {"input": ["device-002"]})
    assert sorted(name for each in result.sums for name in each.survivors) == sorted(
        set(fleet.devices) - {"device-002"}
    )
    for each in result.sums:
        fleet.assert_exact(each, each.survivors)


def test_a_session_of_devices_in_javascript_alone_has_exact_sums(mixed: Mixed) -> None:
    fleet = mixed(4, range(4))
    _, result = fleet.round(fleet.establish())
    fleet.assert_exact(result, set(fleet.devices))


def test_an_honest_but_curious_session_has_exact_sums(mixed: Mixed) -> None:
    fleet = mixed(4, {0, 2}, adversary=Adversary.HONEST_BUT_CURIOUS)
    _, result = fleet.round(fleet.establish(), {"input": ["device-001"]})
    fleet.assert_exact(result, set(fleet.devices) - {"device-001"})


def test_a_round_that_too_few_finish_is_aborted_and_the_next_one_has_a_sum(mixed: Mixed) -> None:
    fleet = mixed(4, {0, 1})
    session = fleet.establish()
    aborted = fleet.round(session, {"input": ["device-000", "device-001"]})
    assert isinstance(aborted, RoundAborted)
    assert aborted.reason is AbortReason.TOO_FEW
    assert isinstance(aborted.session, Established)
    _, result = fleet.round(aborted.session)
    fleet.assert_exact(result, set(fleet.devices))


def refuses(fleet: MixedFleet, name: str, step: Step, body: bytes, about: str, **fields: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        fleet.program.answer(name, step, body, **fields)
    assert (caught.value.name, caught.value.about) == ("ProtocolError", about)


def resigned(fleet: MixedFleet, kind: Any, raw: bytes, **changes: Any) -> bytes:
    """The message with other fields, signed by the coordinator itself."""
    return envelope.sign(fleet.key, replace(kind.decode(envelope.unverified_body(raw)), **changes))


def test_a_device_in_javascript_checks_in_where_it_contributes_what_is_summed(mixed: Mixed) -> None:
    fleet = mixed(4, {1})
    challenge = envelope.sign(fleet.key, Challenge(bytes(32), 0))
    assert fleet.program.answer("device-001", Step.CHECK_IN, challenge, consent=b"moments")
    refuses(fleet, "device-001", Step.CHECK_IN, challenge, "consent", consent=b"observations")


def test_a_device_in_javascript_refuses_steps_out_of_order_and_repeated_ones(mixed: Mixed) -> None:
    fleet = mixed(4, {0})
    me = "device-000"
    _, offer = fleet.offer()
    for step in (Step.ROSTER, Step.PLAN, Step.SURVIVORS, Step.UNMASK):
        refuses(fleet, me, step, offer, "step")
    session = fleet.establish()
    _, plans = fleet.begin(session)
    fleet.contribute(me, plans[me])
    refuses(fleet, me, Step.ROSTER, plans[me], "step")
    refuses(fleet, me, Step.UNMASK, plans[me], "session.adversary")
    refuses(fleet, me, Step.PLAN, plans[me], "plan.round")


def test_a_device_that_cannot_store_what_it_remembers_answers_no_plan_and_takes_part_in_the_next_round(
    mixed: Mixed,
) -> None:
    fleet = mixed(5, {1})
    me, session = "device-001", fleet.establish()
    _, plans = fleet.begin(session)
    fleet.program.ask("fill", me, full=True)
    with pytest.raises(RefusedError) as caught:
        fleet.contribute(me, plans[me])
    assert (caught.value.name, caught.value.about) == ("ConfigError", "identities")
    fleet.program.ask("fill", me, full=False)
    refuses(fleet, me, Step.PLAN, plans[me], "plan.round")  # what it masked for this round is not made again
    session, result = fleet.round(session, {"input": [me]})
    fleet.assert_exact(result, set(fleet.devices) - {me})
    _, result = fleet.round(session)
    fleet.assert_exact(result, set(fleet.devices))


def test_a_device_in_javascript_signs_and_unmasks_one_survivor_set(mixed: Mixed) -> None:
    fleet = mixed(5, {0}, rounds=1)
    me = "device-000"
    state, bodies = fleet.collect(fleet.establish())
    vectors = Survivors.decode(envelope.unverified_body(bodies[me])).vectors
    fewer = {name: vector for name, vector in vectors.items() if name != "device-004"}
    smaller = resigned(fleet, Survivors, bodies[me], vectors=fewer)
    without = {name: vector for name, vector in vectors.items() if name != me}
    refuses(fleet, me, Step.SURVIVORS, resigned(fleet, Survivors, bodies[me], vectors=without), "survivors.self")
    isolated = {name: vectors[name] for name in (me, "device-001")}
    refuses(fleet, me, Step.SURVIVORS, resigned(fleet, Survivors, bodies[me], vectors=isolated), "survivors.size")
    state, requests = fleet.confirm(state, bodies)
    refuses(fleet, me, Step.SURVIVORS, smaller, "step")  # it signed a set
    request = Unmask.decode(envelope.unverified_body(requests[me]))
    other = replace(request.survivors, vectors=fewer)
    refuses(fleet, me, Step.UNMASK, resigned(fleet, Unmask, requests[me], survivors=other), "unmask.survivors")
    one, *_ = request.consistency_signatures
    forged = {**request.consistency_signatures, one: bytes(64)}
    refuses(fleet, me, Step.UNMASK, resigned(fleet, Unmask, requests[me], consistency_signatures=forged), "signature")
    _, result = fleet.open(state, requests)
    fleet.assert_exact(result, set(fleet.devices))
    refuses(fleet, me, Step.UNMASK, requests[me], "step")


def test_a_device_in_javascript_helps_to_sums_from_one_adapter_over_one_set(mixed: Mixed) -> None:
    fleet = mixed(4, {0})
    me = "device-000"
    session, result = fleet.round(fleet.establish())
    fleet.assert_exact(result, set(fleet.devices))
    same = {"adapter_version": 1, "adapter_digest": next(iter(BLOBS)), "cohort": None}
    _, plans = session.plan(**same, training=b"other settings")
    refuses(fleet, me, Step.PLAN, plans[me], "plan.terms")
    state, plans = replace(session, last_round=session.last_round + 1).plan(**same, training=TASK.encode())
    for name in sorted(set(plans) - {"device-001"}):
        state = fleet.accept(state, "on_masked_input", name, fleet.contribute(name, plans[name]))
    _, bodies = state.close()
    refuses(fleet, me, Step.SURVIVORS, bodies[me], "survivors.repeat")


def test_a_device_in_javascript_refuses_false_rosters(mixed: Mixed) -> None:
    fleet = mixed(4, {0})
    me = "device-000"
    offering, offer = fleet.offer()
    for name in sorted(fleet.devices):
        offering = offering.on_advert(name, fleet.join(name, offer))
    _, roster = offering.close()
    first, *others = Roster.decode(envelope.unverified_body(roster)).adverts
    own = fleet.program.answer(me, Step.OFFER, offer)  # it joins again, with new keys
    refuses(fleet, me, Step.ROSTER, roster, "roster.self")
    for adverts, about in (
        ((own,), "roster.size"),
        ((own, *others[::-1]), "roster.order"),
        ((own, others[0], *others[:-1]), "roster.order"),
        (others, "roster.self"),
        ((own, *others[:-1], first), "roster.order"),
    ):
        refuses(fleet, me, Step.ROSTER, resigned(fleet, Roster, roster, adverts=tuple(adverts)), about)
    refuses(fleet, me, Step.ROSTER, resigned(fleet, Roster, roster, offer=bytes(32)), "roster.offer")
    assert fleet.program.answer(me, Step.ROSTER, resigned(fleet, Roster, roster, adverts=(own, *others)))


def test_a_device_in_javascript_takes_revocations_from_the_authority_alone(mixed: Mixed) -> None:
    fleet = mixed(4, {0})
    me, other = "device-000", "device-001"
    _, offer = fleet.offer()
    gone = {serial(fleet.devices[other].certificate): Revocation(BEGIN)}
    newer, older = (fleet.authority.revocations(n, given, BEGIN, END).der for n, given in ((2, gone), (1, {})))
    stranger = make_fleet(4, seed=9).authority.revocations(3, {}, BEGIN, END).der
    refuses(fleet, me, Step.OFFER, offer, "revocations.signature", revocations=stranger)
    refuses(fleet, me, Step.OFFER, offer, "revocations", revocations=newer[:-1])
    assert fleet.program.answer(me, Step.OFFER, offer, revocations=older)
    refuses(fleet, me, Step.OFFER, offer, "certificate.revoked", revocations=newer)
    refuses(fleet, me, Step.OFFER, offer, "certificate.revoked")
    refuses(fleet, me, Step.OFFER, offer, "revocations.number", revocations=older)


def test_an_offer_without_a_proof_about_the_log_is_refused(mixed: Mixed) -> None:
    fleet = mixed(4, {0}, {"demand_proofs": True})
    _, offer = fleet.offer()
    refuses(fleet, "device-000", Step.OFFER, offer, "message.proof")
    refuses(fleet, "device-000", Step.OFFER, offer, "encoding.length", proof=b"")
    refuses(fleet, "device-000", Step.OFFER, offer, "encoding.length", proof=bytes(9))


NOISY = VectorSpec((Segment("delta", 7, 4.0, noise=2.0),), 24, 4)
PRIVATE = {"vector": NOISY, "clip_norm": 4.0, "weight_cap": 1, "privacy": Privacy(Mechanism.SKELLAM, 2, 1e-6)}


def account(fleet: MixedFleet, name: str, delta: float) -> tuple[float, int, int]:
    """Of a device in JavaScript, as it is stored: epsilon, and its contributions with and without noise."""
    found = fleet.program.ask("ledger", name, delta=delta)
    return found["epsilon"], found["noisy"], found["bare"]


def test_a_device_in_javascript_accounts_for_a_round_before_it_answers_and_refuses_the_one_beyond_its_limit(
    mixed: Mixed,
) -> None:
    native, spec, me = PrivacyLedger(), session_spec(4, **PRIVATE), "device-000"
    two = spec.spent(4, 1).times(2) + spec.spent(spec.minimum_survivors, 1)
    limits = {"maximum_epsilon": two.epsilon(1e-6) * (1 - 1e-6)}
    policy = replace(Policy(), **limits)
    fleet = mixed(4, {0}, limits, **PRIVATE)
    session = fleet.establish()
    for number in (1, 2):
        state, plans = fleet.begin(session)
        native = privacyledger.on_plan(native, spec, 4, policy)
        for name in sorted(plans):
            state = fleet.accept(state, "on_masked_input", name, fleet.contribute(name, plans[name]))
        assert account(fleet, me, 1e-6) == (pytest.approx(native.spent.epsilon(1e-6)), number, 0)
        state, requests = fleet.confirm(*state.close())
        session, result = fleet.open(state, requests)
        native = privacyledger.on_survivors(native, spec, 4, 4, policy)
        assert account(fleet, me, 1e-6) == (pytest.approx(native.spent.epsilon(1e-6)), number, 0)
        plain = np.sum([fleet.plain[name]["delta"] for name in fleet.devices if name != me], axis=0)
        added = result.values["delta"] - plain  # by the device in JavaScript alone: those in Python add none here
        assert 0 < np.abs(added).max() < 2 * spec.clip_norm + 2.0 * 12  # a deviation of 2
    _, plans = fleet.begin(session)
    with pytest.raises(RefusedError) as caught:
        fleet.contribute(me, plans[me])
    assert (caught.value.name, caught.value.about) == ("ProtocolError", "plan.epsilon")
    assert account(fleet, me, 1e-6)[1] == 2


def test_an_owner_who_demands_noise_joins_no_session_without(mixed: Mixed) -> None:
    for limits in ({"maximum_epsilon": 1.0}, {"minimum_noise_multiplier": 0.5}):
        fleet = mixed(4, {0}, limits)
        _, offer = fleet.offer()
        refuses(fleet, "device-000", Step.OFFER, offer, "offer.privacy")


def test_an_offer_that_breaks_the_policy_is_refused(mixed: Mixed) -> None:
    fleet = mixed(4, {0})
    me = "device-000"
    _, offer = fleet.offer()
    spec = Offer.decode(envelope.unverified_body(offer)).spec
    for changes, about in (
        ({"threshold": 2}, "offer.threshold"),
        ({"base_digest": "0" * 64}, "offer.base_digest"),
        ({"weight_cap": 65_537}, "offer.weight_cap"),
        ({"rounds": 65}, "offer.rounds"),
        ({"vector": vector_spec(4, bits=7)}, "offer.ring_bits"),
        ({"vector": vector_spec(4, bits=33)}, "offer.ring_bits"),
    ):
        refuses(fleet, me, Step.OFFER, resigned(fleet, Offer, offer, spec=replace(spec, **changes)), about)
    stranger = replace(fleet, key=fleet.devices["device-001"].identity)
    refuses(fleet, me, Step.OFFER, resigned(stranger, Offer, offer), "signature")
