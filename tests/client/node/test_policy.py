"""The [policy] table can set every limit of the protocol core, has its defaults, and refuses wrong values."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.errors import ConfigError, ProtocolError
from aggregation.pki.identity import IdentityKey
from aggregation.policy import Policy
from aggregation.privacy.accounting import Mechanism, NoisySum, Spent
from aggregation.spec import Adversary
from client.cli import device
from client.node.policy import PolicySettings, TrainingLimits
from client.node.privacyledger import PrivacyLedger
from client.node.statedir import DeviceSettings, DeviceStateDir
from client.training.control import TrainingControl
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds.analytic import AnalyticTask
from edgeadapt.rounds.discovery import DiscoveryTask
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.observation import ObservationTask
from edgeadapt.rounds.roundtask import RoundTask
from edgeadapt.rounds.task import Task
from tests.support import refused

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "reference" / "device-policy.md"
BASE, OTHER = "a" * 64, "b" * 64
RESOURCES = {
    "duty_cycle",
    "maximum_labels",
    "maximum_ring_bits",
    "maximum_seconds",
    "maximum_tokens",
    "maximum_virtual_tokens",
    "minimum_ring_bits",
}
CHANGED: dict[str, Any] = {
    "known_bases": [BASE],
    "adversaries": ["active", "honest-but-curious"],
    "corrupt_fraction": 0.25,
    "demand_proofs": False,
    "revocation_days": 7,
    "maximum_labels": 60,
    "moments": False,
}


class Zero:
    def bytes(self, n: int) -> bytes:
        return bytes(n)


def with_policy(folder: Path, table: str) -> DeviceStateDir:
    DeviceStateDir.create(folder, DeviceSettings(base="some_base"), IdentityKey(bytes(32)), {}, Zero())
    (folder / "device.toml").write_text(f'base = "some_base"\n[policy]\n{table}')
    return DeviceStateDir.open(folder)


def test_the_limits_of_the_core_are_keys_with_its_defaults_and_are_in_force(tmp_path: Path) -> None:
    assert PolicySettings().policy(BASE) == Policy(known_bases=frozenset({BASE}))
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in CHANGED.items())
    found = with_policy(tmp_path, table).settings.policy
    changed = {"corrupt_fraction": 0.25, "demand_proofs": False, "revocation_days": 7}
    expected = Policy(known_bases=frozenset({BASE}), adversaries=frozenset(Adversary), **changed)  # type: ignore[arg-type]
    assert found.policy(BASE) == expected
    assert (found.maximum_labels, found.moments) == (60, False)


def test_the_owners_limits_of_time_memory_and_pauses_bound_a_training(tmp_path: Path) -> None:
    limits = with_policy(tmp_path, "maximum_seconds = 90\nduty_cycle = 0.25\nmaximum_tokens = 64\n")
    control = limits.settings.policy.control()
    assert (control.seconds, control.duty_cycle, control.tokens) == (90.0, 0.25, 64)
    assert TrainingLimits().control() == TrainingControl(gradient_norm=10.0, unfailing=True)


def test_a_policy_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    settings = DeviceSettings(base='a "base"', policy=PolicySettings(**CHANGED))
    DeviceStateDir.create(tmp_path, settings, IdentityKey(bytes(32)), {}, Zero())
    assert DeviceStateDir.open(tmp_path).settings == settings


def test_with_a_base_that_is_not_known_a_device_joins_no_session() -> None:
    assert PolicySettings(known_bases=[OTHER]).policy(BASE).known_bases == frozenset()
    assert PolicySettings(known_bases=[OTHER, BASE]).policy(BASE).known_bases == {BASE}


@pytest.mark.parametrize(
    ("table", "about"),
    [
        ("minimum_cohort = 2\n", "policy.minimum_cohort"),
        ("minimum_survivors = 8\n", "policy"),
        ("minimum_cohrt = 8\n", "policy.minimum_cohrt"),
        ("corrupt_fraction = 1.0\n", "policy.corrupt_fraction"),
        ("corrupt_fraction = nan\n", "policy.corrupt_fraction"),
        ("minimum_ring_bits = 40\nmaximum_ring_bits = 30\n", "policy"),
        ("adversaries = []\n", "policy.adversaries"),
        ('adversaries = ["none"]\n', "policy.adversaries.0"),
        ('known_bases = ["AB"]\n', "policy.known_bases.0"),
        ("demand_proofs = 0\n", "policy.demand_proofs"),
        ("revocation_days = 1.5\n", "policy.revocation_days"),
        ("maximum_weight = true\n", "policy.maximum_weight"),
        ("maximum_magnitude = inf\n", "policy.maximum_magnitude"),
        ("duty_cycle = 0\n", "policy.duty_cycle"),
    ],
)
def test_a_wrong_policy_is_refused_by_key(tmp_path: Path, table: str, about: str) -> None:
    with refused(ConfigError, about) as caught:
        with_policy(tmp_path, table)
    assert str(tmp_path / "device.toml") in str(caught.value)


def test_the_document_says_what_a_weaker_value_of_each_limit_on_privacy_costs() -> None:
    """The table of all keys is generated. A new key has a row in the second table, or bounds resources alone."""
    limits, _, _ = DOCUMENT.read_text().partition("## What bounds each key of a task")
    assert "\n<!-- generated: policy -->\n" in limits
    rows = re.findall(r"^\| `(\w+)` \| .+ \|$", limits, re.MULTILINE)
    assert rows == [name for name in PolicySettings.model_fields if name not in RESOURCES]


# What bounds each key of a task.

KINDS: dict[type[RoundTask], str] = {
    Task: "training",
    AnalyticTask: "analytic head",
    EvaluationTask: "evaluation",
    ObservationTask: "observation",
    DiscoveryTask: "discovery",
}
TASKS = (
    Task(PeftConfig.lora(2, 4), ("a", "b"), 1, 4, 0.01, 0.0, 0.0, PARTS, PARTS),
    AnalyticTask(PeftConfig.lora(2, 4), ("a", "b"), 1e-3, 16.0),
    EvaluationTask(PeftConfig.lora(2, 4), ("a", "b"), "a" * 64, "b" * 64, 32),
    ObservationTask(PeftConfig.lora(2, 4), ("a", "b"), ("doubt",), 20_000, 7),
    DiscoveryTask(PeftConfig.lora(2, 4), ("a", "b"), "", 24),
)


def test_the_document_names_the_bound_of_every_key_of_every_task() -> None:
    """A key without a bound does not pass: it has no row, and a number without a limit is refused by every device."""
    section = DOCUMENT.read_text().partition("## What bounds each key of a task")[2].partition("## ")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE))
    for task in TASKS:
        for field in dataclasses.fields(task):
            key, number = field.name, isinstance(getattr(task, field.name), int | float)
            bound = rows.pop(f"{KINDS[type(task)]}: `{key}`")
            limits = [
                f"{side}_{key}" for side in ("minimum", "maximum") if f"{side}_{key}" in PolicySettings.model_fields
            ]
            assert all(f"`{limit}`" in bound for limit in limits), key
            assert limits or not number or task.NEED_NO_LIMIT[key] == bound, key
            assert set(re.findall(r"`((?:min|max)imum_\w+)`", bound)) <= set(PolicySettings.model_fields), key
    assert set(rows) == {"key", "---"}


def test_a_pass_over_the_variants_counts_as_one_over_the_examples() -> None:
    allowed = dataclasses.replace(TASKS[0], epochs=2, variants=4)
    TrainingLimits().check(allowed, {})
    with refused(ProtocolError, "task.epochs", "task.epochs 12 is over", peer="coordinator"):
        TrainingLimits().check(dataclasses.replace(allowed, variants=5), {})


def test_a_number_of_a_task_without_a_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    TrainingLimits().check(TASKS[1], {})
    for task, about in ((TASKS[1], "task.ridge"), (TASKS[2], "task.most")):
        monkeypatch.setattr(type(task), "NEED_NO_LIMIT", {})
        with refused(ProtocolError, about, peer="coordinator"):
            TrainingLimits().check(task, {})


def test_the_command_prints_what_is_in_force(tmp_path: Path) -> None:
    state_dir = with_policy(tmp_path, "minimum_cohort = 20\n")
    printed = CliRunner().invoke(device, ["policy", "--state", str(state_dir.folder)])
    assert printed.exit_code == 0, printed.exception
    lines = [line for line in printed.output.splitlines() if not line.startswith("    ")]
    assert ["*", "minimum_cohort", "20"] in [line.split() for line in lines]
    assert [line.split()[0] for line in lines].count("*") == 1
    assert len(lines) == len(PolicySettings.model_fields) + 1
    shown = json.loads(CliRunner().invoke(device, ["policy", "--state", str(state_dir.folder), "--json"]).stdout)
    assert shown["changed"] == ["minimum_cohort"]
    assert PolicySettings(**shown["policy"]) == state_dir.settings.policy
    assert shown["privacy"] == {"epsilon": 0.0, "left": None, "noisy": 0, "bare": 0}


def test_the_command_prints_what_contributions_may_have_revealed(tmp_path: Path) -> None:
    state_dir = with_policy(tmp_path, "maximum_epsilon = 8.0\n")
    spent = Spent.on([NoisySum(Mechanism.SKELLAM, 100, 10**6, 1e6, 16)])
    state_dir.save(PrivacyLedger(settled=spent, pending=spent, noisy=2, bare=1))
    printed = CliRunner().invoke(device, ["policy", "--state", str(state_dir.folder)]).output.splitlines()[-1]
    found = (spent + spent).epsilon(1e-6)
    assert f"epsilon {found:.2f} of 8, {8 - found:.2f} left, " in printed
    shown = json.loads(CliRunner().invoke(device, ["policy", "--state", str(state_dir.folder), "--json"]).stdout)
    assert shown["privacy"] == {"epsilon": found, "left": 8 - found, "noisy": 2, "bare": 1}
