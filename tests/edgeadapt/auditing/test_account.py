"""The coordinator's account of what its sums reveal is that of its logs, and an audit recomputes it from them alone."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.errors import ConfigError, TrustError
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Privacy, SessionSpec
from aggregation.steps import Step
from aggregation.vector import Segment, VectorSpec
from coordinator.registry import Registry
from coordinator.settings import FederationSettings
from edgeadapt.auditing import AuditInput, AuditOptions
from edgeadapt.auditing.account import Account, audited, require_recorded
from edgeadapt.auditing.findings import Check, Status
from edgeadapt.auditing.transcripts import require_published
from edgeadapt.formats.layout import Layout, TensorSpec
from edgeadapt.formats.manifest import PrivacyBound
from tests.support import FleetOf, refused
from tests.support.fleet import session_spec

NOISY = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 1.0, "aggregation__clip_norm": 0.5}


def noisy_session() -> SessionSpec:
    vector = VectorSpec((Segment("delta", 500, 0.4, 0.5),), 16, 10)
    return session_spec(10, vector=vector, clip_norm=1.0, weight_cap=1, privacy=Privacy(Mechanism.SKELLAM, 6, 1e-6))


def reports_of(fleet: Any) -> tuple[AuditInput, Any]:
    checked = AuditInput.open(fleet.out / "coordinator", AuditOptions())
    return checked, checked.audit(unfinished=False)


def test_an_audit_finds_the_recorded_epsilon_from_the_logs_alone(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8, rounds=3, aggregation__session_rounds=2, **NOISY)
    records = fleet.federate(fleet.grid(forced_dropouts=1))
    checked, reports = reports_of(fleet)
    checked.require(reports, unfinished=False)
    found = [each.epsilon for report in reports.values() for each in report.rounds]
    assert found == [record.epsilon for record in records]
    assert found == sorted(found)
    assert None not in found
    stated = [fleet.registry().version(number).manifest.privacy for number in range(4)]
    assert stated == [None, *(PrivacyBound(epsilon, 1e-6) for epsilon in found)]
    assert len(reports) == 2
    last = [finding for finding in list(reports.values())[-1].findings if finding.check is Check.PRIVACY]
    assert [finding.status for finding in last] == [Status.PASS]
    assert f"epsilon {found[-1]:.3f} for delta 1e-06, of the device that spent most, after 3 sums" in last[0].text
    more = replace(records[-1], epsilon=found[-1] * (1 - 1e-6))
    with refused(TrustError, "record.epsilon", value=3):
        require_recorded([*records[:-1], more], reports)
    with refused(TrustError, "record.epsilon", value=3):
        require_recorded([*records[:-1], replace(records[-1], epsilon=None)], reports)


def test_a_manifest_with_the_epsilon_of_another_delta_is_found(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8, rounds=1, **NOISY)
    fleet.federate(fleet.grid())
    checked, reports = reports_of(fleet)
    manifests = [checked.registry.manifest(version) for version in (0, 1)]
    bound = manifests[1].privacy
    require_published(checked.records, manifests.__getitem__, reports)
    for false in (replace(bound, delta=bound.delta / 2), replace(bound, epsilon=bound.epsilon / 2), None):
        stated = [manifests[0], replace(manifests[1], privacy=false)]
        with refused(TrustError, "record", value=1):
            require_published(checked.records, stated.__getitem__, reports)


def test_a_device_of_sampled_cohorts_is_charged_for_its_own_rounds_without_amplification() -> None:
    """Ten devices out of forty in each of eight rounds; the settings calibrate to a device that is in all of them."""
    settings = FederationSettings.parse(
        {"rounds": 8, "privacy": {"mechanism": "skellam", "epsilon": 8.0}, "aggregation": {"clip_norm": 1.0}}, "test"
    )
    spec = settings.session_spec(10, Layout((TensorSpec("a", (500,)),)), "b" * 64, 8)
    rng, account, names = np.random.default_rng(0), Account(), [f"device-{number}" for number in range(40)]
    cohorts = [rng.choice(names, 10, replace=False).tolist() for _ in range(8)]
    for cohort in cohorts:
        account = account.after(spec, cohort)
    rounds = Counter(name for cohort in cohorts for name in cohort)
    one = spec.spent(10)
    assert {name: spent.epsilon(1e-6) for name, spent in account.spent.items()} == {
        name: pytest.approx(one.times(count).epsilon(1e-6)) for name, count in rounds.items()
    }
    most = max(rounds.values())
    assert 1 < most < 8
    assert account.epsilon(spec) == pytest.approx(one.times(most).epsilon(1e-6))
    assert one.times(most).epsilon(1e-6) < one.times(8).epsilon(1e-6) < settings.privacy.epsilon


def test_without_noise_no_epsilon_is_claimed(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8, rounds=1)
    (record,) = fleet.federate(fleet.grid())
    checked, reports = reports_of(fleet)
    checked.require(reports, unfinished=False)
    assert record.epsilon is None
    (report,) = reports.values()
    assert [each.epsilon for each in report.rounds] == [None]
    with refused(TrustError, "record.epsilon", value=1):
        require_recorded([replace(record, epsilon=1.0)], reports)
    account, _ = audited(Account(), report)
    assert (account.noisy, account.bare) == (0, 1)


def test_after_a_sum_without_noise_no_epsilon_is_claimed_for_later_ones(fleet_of: FleetOf) -> None:
    """An adapter with noise is made from the one before it, which says what it says."""
    fleet = fleet_of(8, rounds=1, **{**NOISY, "privacy__mechanism": "none", "privacy__noise_multiplier": 0.0})
    fleet.federate(fleet.grid())
    fleet.configure({"privacy.mechanism": "skellam", "privacy.noise_multiplier": 1.0, "rounds": 2})
    records = fleet.federate(fleet.grid())
    assert [(record.version, record.epsilon) for record in records] == [(1, None), (2, None)]
    checked, reports = reports_of(fleet)
    checked.require(reports, unfinished=False)
    *_, last = reports.values()
    (finding,) = [finding for finding in last.findings if finding.check is Check.PRIVACY]
    assert "because of 1 sum of this coordinator without noise" in finding.text
    with refused(TrustError, "record.epsilon", value=2):
        require_recorded([records[0], replace(records[1], epsilon=8.0)], reports)


def test_too_little_noise_for_a_finite_epsilon_is_recorded_as_none(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8, rounds=1, **{**NOISY, "privacy__noise_multiplier": 0.01})
    (record,) = fleet.federate(fleet.grid())
    checked, reports = reports_of(fleet)
    checked.require(reports, unfinished=False)
    assert (record.version, record.epsilon) == (1, None)


def without_answers(step: Step) -> Any:
    """The devices' app, in which no message of a step is answered."""
    from client.node.app import app

    def answer(message: Any, context: Any) -> Any:
        if message.metadata.message_type.endswith(step.value):
            raise RuntimeError("no answer")
        return app(message, context)

    return answer


@pytest.mark.parametrize(("step", "counted"), [(Step.PLAN, 0), (Step.SURVIVORS, 1), (Step.UNMASK, 1)])
def test_a_sum_counts_once_its_survivors_were_named_also_without_a_result(
    fleet_of: FleetOf, step: Step, counted: int
) -> None:
    fleet = fleet_of(8, rounds=1, attempts=1, **NOISY)
    (record,) = fleet.federate(fleet.grid(app=without_answers(step)))
    assert record.aborted is not None
    checked, reports = reports_of(fleet)
    checked.require(reports, unfinished=False)
    assert (record.epsilon or 0) > 0 if counted else record.epsilon == 0
    (report,) = reports.values()
    assert audited(Account(), report)[0].noisy == counted


def test_a_sum_whose_round_was_interrupted_counts(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the unmask request and the record: the log has the survivors, the registry has no round."""
    whole = fleet_of(8, rounds=2, **NOISY)
    expected = whole.federate(whole.grid())
    fleet = fleet_of(8, rounds=1, **NOISY)
    real = Registry.commit_round

    def killed(*_: Any) -> None:
        raise OSError("killed")

    monkeypatch.setattr(Registry, "commit_round", killed)
    with pytest.raises(OSError, match="killed"):
        fleet.federate(fleet.grid())
    monkeypatch.setattr(Registry, "commit_round", real)
    (record,) = fleet.federate(fleet.grid())
    assert record.round == 1
    assert record.epsilon == pytest.approx(expected[1].epsilon, rel=1e-12)
    checked, reports = reports_of(fleet)
    checked.require(reports, unfinished=False)


def test_a_federation_ends_before_it_exceeds_its_epsilon(fleet_of: FleetOf) -> None:
    fleet = fleet_of(8, rounds=2, privacy__mechanism="skellam", privacy__epsilon=4.0, aggregation__clip_norm=0.5)
    records = fleet.federate(fleet.grid())
    assert 0 < records[0].epsilon < records[1].epsilon <= 4.0
    settings = FederationSettings.read(fleet.out / "coordinator" / "federation.toml")
    assert settings.rounds == 2
    fleet.configure({"rounds": 3, "privacy.epsilon": records[1].epsilon})
    with refused(ConfigError, "privacy.epsilon"):
        fleet.federate(fleet.grid())
    assert len(fleet.registry().rounds()) == 2


def test_the_status_shows_the_epsilon_of_each_round(fleet_of: FleetOf, tmp_path: Path) -> None:
    from coordinator.statedir import CoordinatorStateDir
    from coordinator.status import lines_of, status_of

    fleet = fleet_of(8, rounds=1, **NOISY)
    (record,) = fleet.federate(fleet.grid())
    status = status_of(CoordinatorStateDir.open(fleet.out / "coordinator"))
    assert status["rounds"][0]["epsilon"] == record.epsilon
    assert f"epsilon {record.epsilon:.3f}" in list(lines_of(status))[-1]


def test_each_device_counts_for_the_sums_that_it_is_in() -> None:
    spec = noisy_session()
    one, first, second = spec.spent(8), ("a", *"bcdefgh"), ("a", *"ijklmno")
    account = Account().after(spec, first).after(spec, second).after(spec, ())
    assert (account.noisy, len(account.spent)) == (2, 15)
    assert account.spent["a"] == one + one
    assert account.spent["b"] == account.spent["o"] == one
    assert account.epsilon(spec) == (one + one).epsilon(1e-6)
    smallest = spec.spent(spec.minimum_survivors)
    assert account.epsilon_of_next(spec, "bo") == (one + smallest).epsilon(1e-6)
    assert account.epsilon_of_next(spec, "az") == (one + one + smallest).epsilon(1e-6)
