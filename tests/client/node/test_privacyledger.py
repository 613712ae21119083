"""A device counts what its contributions reveal, and refuses a plan that would exceed its limit, whoever sends it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.pki.identity import IdentityKey
from aggregation.policy import Policy
from aggregation.privacy.accounting import NOTHING, Mechanism, Spent
from aggregation.spec import Privacy, SessionSpec
from aggregation.vector import Segment, VectorSpec
from client.node import privacyledger, step
from client.node.adapterstate import AdapterState
from client.node.privacyledger import PrivacyLedger, on_plan, on_survivors
from client.node.statedir import LEDGER, DeviceSettings, DeviceStateDir
from tests.support import FleetOf, refused
from tests.support.fleet import session_spec

COHORT = 10


def spec_of(deviation: float = 0.5) -> SessionSpec:
    vector = VectorSpec((Segment("delta", 500, 0.4, deviation),), 16, COHORT)
    privacy = Privacy(Mechanism.SKELLAM, 6, 1e-6)
    return session_spec(COHORT, vector=vector, clip_norm=1.0, weight_cap=1, privacy=privacy)


SPEC = spec_of()
SMALLEST, ALL = SPEC.spent(SPEC.minimum_survivors, 1), SPEC.spent(COHORT, 1)


def epsilon(spent: Spent) -> float:
    return spent.epsilon(1e-6)


def test_a_contribution_counts_as_one_to_the_smallest_sum_until_its_survivors_are_known() -> None:
    planned = on_plan(PrivacyLedger(), SPEC, COHORT, Policy())
    assert planned == PrivacyLedger(NOTHING, SMALLEST, 1, 0)
    known = on_survivors(planned, SPEC, COHORT, COHORT, Policy())
    assert known == PrivacyLedger(ALL, NOTHING, 1, 0)
    assert epsilon(known.spent) < epsilon(planned.spent)


def test_a_round_whose_end_the_device_did_not_see_counts_in_full() -> None:
    once = on_plan(PrivacyLedger(), SPEC, COHORT, Policy())
    twice = on_plan(once, SPEC, COHORT, Policy())
    assert twice == PrivacyLedger(SMALLEST, SMALLEST, 2, 0)
    assert on_survivors(twice, SPEC, COHORT, COHORT, Policy()).spent == SMALLEST + ALL


def test_the_owners_corrupt_fraction_counts_if_it_is_above_the_sessions() -> None:
    planned = on_plan(PrivacyLedger(), SPEC, COHORT, Policy(corrupt_fraction=0.4, minimum_survivors=2))
    assert planned.pending == SPEC.spent(SPEC.minimum_survivors, 4)
    assert epsilon(planned.pending) > epsilon(SMALLEST)


def test_a_plan_beyond_the_limit_is_refused_and_one_within_it_is_not() -> None:
    ledger, limit = PrivacyLedger(), epsilon(SMALLEST.times(3)) * 1.001
    for _ in range(3):
        ledger = on_plan(ledger, SPEC, COHORT, Policy(maximum_epsilon=limit))
    with refused(ProtocolError, "plan.epsilon"):
        on_plan(ledger, SPEC, COHORT, Policy(maximum_epsilon=limit))
    assert on_plan(ledger, SPEC, COHORT, Policy()).noisy == 4


def test_the_limit_is_for_the_owners_delta() -> None:
    limit = epsilon(SMALLEST) * 1.001
    on_plan(PrivacyLedger(), SPEC, COHORT, Policy(maximum_epsilon=limit))
    with refused(ProtocolError, "plan.epsilon"):
        on_plan(PrivacyLedger(), SPEC, COHORT, Policy(maximum_epsilon=limit, delta=1e-9))


def test_contributions_without_noise_are_counted_apart() -> None:
    planned = on_plan(PrivacyLedger(ALL, SMALLEST, 2, 3), session_spec(COHORT), COHORT, Policy())
    assert planned == PrivacyLedger(ALL + SMALLEST, NOTHING, 2, 4)
    assert on_survivors(planned, session_spec(COHORT), COHORT, COHORT, Policy()) == planned


@pytest.mark.parametrize("policy", [{"maximum_epsilon": 8.0}, {"minimum_noise_multiplier": 0.1}])
def test_an_owner_who_demands_noise_joins_no_session_without_it(policy: dict[str, float]) -> None:
    known = {"known_bases": frozenset({SPEC.base_digest}), "maximum_weight": 100, **policy}
    with refused(ProtocolError, "offer.privacy"):
        Policy(**known).check(session_spec(COHORT, minimum_survivors=8, threshold=8), COHORT)  # type: ignore[arg-type]
    spec = replace(SPEC, minimum_survivors=8, threshold=8)
    Policy(**known).check(spec, COHORT)  # type: ignore[arg-type]


def test_less_noise_than_the_owner_demands_is_refused() -> None:
    spec = replace(SPEC, minimum_survivors=8, threshold=8)
    least = {"known_bases": frozenset({SPEC.base_digest}), "minimum_survivors": 2}
    found = spec.noise_multiplier(corrupt=1)
    Policy(**least, minimum_noise_multiplier=found).check(spec, COHORT)  # type: ignore[arg-type]
    with refused(ProtocolError, "offer.noise_multiplier"):
        Policy(**least, minimum_noise_multiplier=found * 1.01).check(spec, COHORT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"), [("minimum_noise_multiplier", -1.0), ("maximum_epsilon", float("nan")), ("delta", 0.0)]
)
def test_limits_out_of_range_are_refused(field: str, value: float) -> None:
    with refused(ConfigError, f"policy.{field}"):
        Policy(**{field: value})  # type: ignore[arg-type]


def test_a_ledger_survives_the_process_and_the_coordinator_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    identity = IdentityKey.generate(SystemEntropy())
    state_dir = DeviceStateDir.create(tmp_path / "state", DeviceSettings(base="b"), identity, {}, SystemEntropy())
    assert state_dir.load(PrivacyLedger) is None
    kept = PrivacyLedger(ALL, SMALLEST, 2, 3)
    state_dir.save(kept)
    state_dir.forget()
    assert DeviceStateDir.open(state_dir.folder).load(PrivacyLedger) == kept
    raw = bytearray((state_dir.folder / LEDGER).read_bytes())
    raw[-1] ^= 1
    (state_dir.folder / LEDGER).write_bytes(raw)
    with refused(TrustError, "sealed.ciphertext"):
        state_dir.load(PrivacyLedger)


def noisy_fleet(fleet_of: FleetOf, **policy: float) -> Any:
    fleet = fleet_of(
        8, rounds=4, privacy__mechanism="skellam", privacy__noise_multiplier=2.0, aggregation__clip_norm=0.5
    )
    for state_dir in (fleet.out / "devices").iterdir():
        text = (state_dir / "device.toml").read_text()
        limits = "".join(f"{key} = {value}\n" for key, value in policy.items())
        (state_dir / "device.toml").write_text(text.replace("[policy]\n", f"[policy]\n{limits}"))
    return fleet


def test_devices_end_a_federation_that_spends_more_than_their_owners_allow(fleet_of: FleetOf) -> None:
    """The coordinator states no epsilon of its own, and goes on until too few devices answer."""
    fleet = noisy_fleet(fleet_of)
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3, 4]
    ledgers = [fleet.state_dir(device).load(PrivacyLedger) for device in records[-1].survivors]
    (spent,) = {ledger.spent for ledger in ledgers}
    assert {ledger.noisy for ledger in ledgers} == {4}
    limit = 0.8 * spent.epsilon(1e-6)
    limited = noisy_fleet(fleet_of, maximum_epsilon=limit)
    limited.configure({"attempts": 1})
    records = limited.federate(limited.grid())
    made = [record.version is not None for record in records]
    assert made == sorted(made, reverse=True)
    assert (made[0], made[-1]) == (True, False)
    left = [limited.state_dir(device).load(PrivacyLedger) for device in records[0].survivors]
    assert {ledger.noisy for ledger in left} == {sum(made)}
    assert all(ledger.spent.epsilon(1e-6) <= limit for ledger in left)


def test_a_kill_before_the_answer_leaves_counts_as_spent(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the ledger and the state of the session: the answer has not left, and counts all the same."""
    fleet = noisy_fleet(fleet_of)
    fleet.configure({"rounds": 1, "attempts": 1})
    real, victim = DeviceStateDir.save, "device-03"

    def killed(state_dir: DeviceStateDir, state: Any) -> None:
        if state_dir.folder.name == victim and isinstance(state, AdapterState):
            raise OSError("killed")
        real(state_dir, state)

    monkeypatch.setattr(DeviceStateDir, "save", killed)
    fleet.federate(fleet.grid())
    assert fleet.state_dir(victim).load(PrivacyLedger).noisy == 1
    assert fleet.state_dir(victim).load(PrivacyLedger).pending != NOTHING
    assert fleet.state_dir("device-01").load(PrivacyLedger).pending == NOTHING


def test_without_the_ledger_devices_would_go_on(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacyledger, "on_plan", lambda known, *_: known)
    assert step.privacyledger is privacyledger
    fleet = noisy_fleet(fleet_of, maximum_epsilon=0.001)
    assert [record.version for record in fleet.federate(fleet.grid())] == [1, 2, 3, 4]
