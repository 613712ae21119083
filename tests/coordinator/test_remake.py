"""The step from the sum to the adapter, made again by an auditor: after real runs, and after each lie about them."""

import shutil
import sqlite3
import sys
import tomllib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

import edgeadapt
from aggregation import envelope
from aggregation.messages import MaskedInput
from aggregation.transcript import read
from coordinator.audit.auditor import Check, Finding, Made, Status
from coordinator.audit.recompute import DIGESTS_ONLY, REPLACED, UNKNOWN_STATE, UNPUBLISHED, Remake
from coordinator.audit.transcripts import AuditedTranscript, Given

PUBLISHED = "published under the coordinator's signature and unaltered since"
FirstSession = tuple[Callable[[], Remake], tuple[Made, ...]]
NOTHING = Given(None, None, None, None, None)


RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {"aggregation__keep_masked_inputs": True},
    "fedadam": {
        "aggregation__keep_masked_inputs": True,
        "server__optimizer": "fedadam",
        "server__learning_rate": 0.02,
    },
    "digests": {},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the homes of finished runs lie, one for each of ``RUNS`` once it was asked for."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def home_of(finished: Path, fleet_of: Callable[..., Any], tmp_path: Path) -> Callable[[str], Path]:
    """The coordinator's home after three rounds in two sessions; each test has a copy to spoil."""

    def make(name: str) -> Path:
        if not (finished / name).exists():
            fleet = fleet_of(4, aggregation__session_rounds=2, **RUNS[name])
            fleet.federate(fleet.grid())
            shutil.copytree(fleet.out / "coordinator", finished / name)
        return Path(shutil.copytree(finished / name, tmp_path / name))

    return make


def adapters(state_dir: Path) -> list[Finding]:
    """What is found about the adapters of each session."""
    reports = AuditedTranscript.open(state_dir, NOTHING).audit(unfinished=False)
    return [finding for report in reports.values() for finding in report.findings if finding.check is Check.ADAPTERS]


def test_adapters_of_a_run_are_made_again_bit_for_bit(home_of: Callable[[str], Path]) -> None:
    first, second = adapters(home_of("fedavg"))
    assert first.status is second.status is Status.PASS
    same = "Made again from the sums by the server's rule: the same bit for bit (FedAvg at rate 1, as"
    assert first.text.startswith(f"2 adapters, {PUBLISHED}. {same}")
    assert second.text.startswith(f"1 adapter, {PUBLISHED}. {same}")


def test_fedadam_is_followed_from_version_zero_through_every_session(home_of: Callable[[str], Path]) -> None:
    first, second = adapters(home_of("fedadam"))
    assert first.status is second.status is Status.PASS
    assert "FedAdam at rate 0.02" in second.text
    assert "Not shown" not in second.text


def test_fedadam_without_its_first_sums_is_said_not_to_be_shown(home_of: Callable[[str], Path]) -> None:
    state_dir = home_of("fedadam")
    (state_dir / "transcript" / "session-000001.log").unlink()
    (only,) = adapters(state_dir)
    assert only.status is Status.SKIPPED
    assert UNKNOWN_STATE in only.text


def test_without_the_masked_updates_only_the_publishing_is_checked(home_of: Callable[[str], Path]) -> None:
    first, _ = adapters(home_of("digests"))
    assert first.status is Status.SKIPPED
    assert first.text == f"2 adapters, {PUBLISHED}. Not shown of 2, that the sum made it: {DIGESTS_ONLY}"


@pytest.mark.parametrize("server", [{"optimizer": "fedadam"}, {"learning_rate": 1.0000001}])
def test_another_rule_than_was_followed_is_found(home_of: Callable[[str], Path], server: dict[str, Any]) -> None:
    state_dir = home_of("fedavg")
    settings = tomllib.loads((state_dir / "federation.toml").read_text())
    (state_dir / "federation.toml").write_text(tomli_w.dumps({**settings, "server": server}))
    first, _ = adapters(state_dir)
    assert first.status is Status.FAIL
    assert "adapter 1 is not what the rule makes of the sum" in first.text
    assert first.place is not None
    assert (first.place.kind, first.place.round) == ("result", 1)


def test_a_bit_of_a_published_file_is_missed(home_of: Callable[[str], Path]) -> None:
    state_dir = home_of("fedavg")
    for number, blob in enumerate(sorted((state_dir / "blobs").iterdir())):
        whole = blob.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) * (number + 1) // 5] ^= 1
        blob.write_bytes(damaged)
        failed = [finding for finding in adapters(state_dir) if finding.status is Status.FAIL]
        assert failed
        assert f"{blob} was altered" in failed[0].text
        blob.unlink()
        assert any(f"{blob} is missing" in finding.text for finding in adapters(state_dir))
        blob.write_bytes(whole)
    assert {finding.status for finding in adapters(state_dir)} == {Status.PASS}


def test_a_manifest_that_is_altered_or_of_another_version_is_found(home_of: Callable[[str], Path]) -> None:
    state_dir = home_of("fedavg")
    with closing(sqlite3.connect(state_dir / "registry.db")) as database, database:
        rows = dict(database.execute("select version, manifest from edgeadapt_versions"))
        database.execute("update edgeadapt_versions set manifest = ? where version = 1", (rows[1][:-1] + b" ",))
        database.execute("update edgeadapt_versions set manifest = ? where version = 3", (rows[2],))
    first, second = adapters(state_dir)
    assert first.status is Status.FAIL
    assert "registry.db, manifest of version 1: edgeadapt/manifest/1" in first.text
    assert second.status is Status.FAIL
    assert "it is the manifest of version 2" in second.text


def test_a_last_session_that_is_left_out_is_missed_by_what_was_published(
    home_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir = home_of("digests")
    (state_dir / "transcript" / "session-000002.log").unlink()
    for options, code in (([], 4), (["--unfinished"], 0)):
        monkeypatch.setattr(sys, "argv", ["edgeadapt", "audit", "verify", str(state_dir), *options])
        with pytest.raises(SystemExit) as caught:
            edgeadapt.main()
        assert (caught.value.code or 0) == code
        assert ("adapter 3 was published, and no log says how it was made" in capsys.readouterr().err) is (code == 4)


def test_a_sum_that_was_not_kept_is_said_beside_those_that_were(home_of: Callable[[str], Path]) -> None:
    state_dir = home_of("fedavg")
    log = read((state_dir / "transcript" / "session-000001.log").read_bytes()).entries
    headers = [entry for entry in log if (entry.kind, entry.round) == (MaskedInput.TAG, 1)]
    signed = MaskedInput.decode(envelope.unverified_body(headers[0].message))
    (state_dir / "transcript" / "vectors" / f"{signed.vector.hex()}.bin").unlink()
    first, _ = adapters(state_dir)
    assert first.status is Status.PASS
    assert ". 1 of 2, made again from the sums by the server's rule: the same bit for bit" in first.text
    assert f"Not shown of 1, that the sum made it: {DIGESTS_ONLY}" in first.text


def test_an_adapter_that_was_never_published_is_found_unless_a_kill_explains_it(
    home_of: Callable[[str], Path],
) -> None:
    state_dir = home_of("fedavg")
    with closing(sqlite3.connect(state_dir / "registry.db")) as database, database:
        database.execute("delete from edgeadapt_versions where version in (1, 3)")
    first, second = adapters(state_dir)
    assert (first.status, "adapter 1 is not in the registry" in first.text) == (Status.FAIL, True)
    assert second.status is Status.SKIPPED
    assert second.text == f"0 adapters, {PUBLISHED}. Not shown of 1, that the sum made it: {UNPUBLISHED}"


@pytest.fixture
def first_session(home_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> FirstSession:
    """Makes a new remake of what is published; and what the audit of the first session hands on to it."""
    handed: list[tuple[Made, ...]] = []

    class Spy(Remake):
        def check(self, made: tuple[Made, ...]) -> Finding:
            handed.append(made)
            return super().check(made)

    monkeypatch.setattr("coordinator.audit.transcripts.Remake", Spy)
    opened = AuditedTranscript.open(home_of("fedavg"), NOTHING)
    opened.audit(unfinished=False)
    assert opened.adapters is not None
    new = partial(Remake, opened.adapters.registry, opened.adapters.rule)
    assert new().check(handed[0]).status is Status.PASS
    return new, handed[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"before": (0, "ab" * 32)}, "the devices got another adapter than was published as 0"),
        ({"survivors": ("someone",)}, "says another survivors than the log"),
        ({"layout": "0" * 64}, "says another layout_digest than the log"),
        ({"values": {"delta": np.zeros(3), "weight": np.ones(1)}}, "flat float32 vectors of one size"),
        ({"values": {"delta": np.zeros(3), "weight": np.zeros(1)}}, "no update with its examples"),
        ({"values": {"other": np.zeros(3)}}, "no update with its examples"),
    ],
)
def test_a_log_that_says_something_else_than_was_published_is_found(
    first_session: FirstSession, changes: dict[str, Any], said: str
) -> None:
    new, (first, second) = first_session
    finding = new().check((replace(first, **changes), second))
    assert finding.status is Status.FAIL
    assert said in finding.text


def test_an_adapter_that_was_exchanged_after_a_sessions_last_sum_is_found(
    first_session: FirstSession,
) -> None:
    new, (first, second) = first_session
    remake = new()
    told = remake.check((replace(first, after=(1, "ab" * 32)),))
    assert told.status is Status.SKIPPED
    assert told.text.startswith("0 adapters")
    assert REPLACED in told.text
    found = remake.check((second,))
    assert found.status is Status.FAIL
    assert "the devices got an adapter 1 that no log made" in found.text


def test_a_round_that_is_run_again_after_a_kill_is_none(
    first_session: FirstSession,
) -> None:
    new, (first, second) = first_session
    remake = new()
    for _ in range(2):  # killed twice between log and registry
        assert remake.check((replace(first, after=(1, "ab" * 32)),)).status is Status.SKIPPED
    assert remake.check(()).status is Status.PASS  # all its rounds were aborted
    assert remake.check((first, second)).status is Status.PASS


def test_one_step_more_in_one_number_of_the_sum_is_found(
    first_session: FirstSession,
) -> None:
    new, (first, second) = first_session
    assert first.values is not None
    delta = first.values["delta"].copy()
    steps = np.abs(np.diff(np.unique(delta)))
    delta[np.abs(delta).argmin()] += steps.min()
    finding = new().check((replace(first, values={**first.values, "delta": delta}), second))
    assert finding.status is Status.FAIL
    assert "adapter 1 is not what the rule makes of the sum" in finding.text


def test_a_session_without_a_result_has_no_adapter(
    first_session: FirstSession,
) -> None:
    finding = first_session[0]().check(())
    assert (finding.status, finding.text) == (Status.PASS, "no adapter was made")
