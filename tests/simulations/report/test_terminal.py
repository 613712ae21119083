"""What a run prints: its content, at eighty columns, in a pipe and with odd names."""

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from adapters.peftconfig import MethodName
from simulations.report.result import ARMS, CanaryBounds, RunResult
from simulations.report.terminal import METHODS, print_scenario, print_table
from simulations.scenario import Scenario


def printed(result: RunResult, *, terminal: bool = False, program: str = "edgeadapt") -> str:
    out = StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system="standard" if terminal else None)
    print_table(result, console, program)
    return out.getvalue()


def test_the_table_has_every_arm_with_its_four_numbers(result: RunResult) -> None:
    lines = [line.split() for line in printed(result).splitlines()]
    rows = {words[0]: words[1:5] for words in lines if words}
    assert rows["base"] == [".446", ".400", ".275", ".383"]
    assert rows["personal"] == [".856", ".825", ".800", ".892"]
    assert {"local", "global"} <= set(rows)


def test_the_lines_below_the_table_have_the_costs_and_the_next_command(result: RunResult) -> None:
    text = printed(result)
    assert "up         263 kB a device a round, 0.29 % of the full model (90.9 MB)" in text
    assert "dropouts   12 of 120 device-rounds: 4 at plan, 5 at survivors, 3 at unmask" in text
    assert "time       4 min 12 s; training 2 min 41 s; coordination 7.4 s, 4.6 % of that" in text
    assert "parity     .9983 of 600 phrases as in torch, largest difference 0.031\n" in text
    assert "exported   accuracy .8100, in torch .8117\n" in text
    assert "phrases    18 of 20 plain phrases right; fewest: de-02, 8 of 10" in text
    assert "says 90 %  personal is right 89 % of 71 times; global is right 93 % of 64 times\n" in text
    assert "calibration error: personal 2.9 % (4.2 % uncalibrated); global 6.4 %\n" in text
    assert text.endswith('edgeadapt device infer --bundle runs/households/bundle "turn on the kitchen lights"\n')


def test_the_privacy_of_the_rounds_is_stated_also_where_nothing_is_bounded(result: RunResult) -> None:
    assert "privacy    none: nothing bounds what the sums say about one device\n" in printed(result)
    rounds = tuple(replace(each, epsilon=0.5 * each.round) for each in result.rounds)
    text = printed(replace(result, rounds=rounds, delta=1e-6))
    assert "privacy    epsilon 5.00: for delta 1e-06 after 10 rounds, for everything of one device\n" in text


@pytest.mark.parametrize(
    ("gaussian", "line"),
    [
        (6.52, "epsilon at least 6.52, below the account of 8.00"),
        (9.1, "epsilon at least 9.10, above the account of 8.00: too little noise, or chance"),
    ],
)
def test_the_bound_of_canaries_is_next_to_the_account(result: RunResult, gaussian: float, line: str) -> None:
    bounds = CanaryBounds(1000, 712, account=8.0, one_run=0.61, gaussian=gaussian, confidence=0.95)
    text = printed(replace(result, canaries=bounds))
    assert f"canaries   {line}\n" in text
    assert "           at 95 % for Gaussian noise, 0.61 for any; 712 of 1000 guessed\n" in text


def test_before_the_run_base_languages_and_arms_are_printed(tmp_path: Path) -> None:
    out = StringIO()
    federation = {"rounds": 7, "training": {"epochs": 2, "learning_rate": 0.01}}
    scenario = Scenario.parse(
        {
            "name": "mine",
            "base": {"model": "some_\x1bencoder"},
            "population": {"languages": ["en", "es"], "public_languages": ["de"]},
            "federation": federation,
            "personal": {"epochs": 5, "learning_rate": 0.003, "public": 4},
        },
        "mine",
    )
    print_scenario(scenario, tmp_path, Console(file=out, width=80), clients=15, devices=12)
    text = out.getvalue()
    for line in (
        "base       some_?encoder, ",
        "local     own data only: 14 epochs at 0.01, then 5 epochs at 0.003",
        "personal  global, then 5 epochs at 0.003 on own data",
        "local, personal: rehearse 4 public phrases of each label",
        f"folder     {tmp_path}",
    ):
        assert line in text
    assert all(f" {arm:<9} " in text for arm in ARMS)
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("folder"))


@pytest.mark.parametrize(
    ("personal", "lines"),
    [
        ({"method": "ridge"}, ["4 epochs at 0.01, then a ridge head", "global, then a ridge head on own data"]),
        (
            {"method": "ensemble"},
            ["then 3 epochs at 0.001", "local, personal: the trained head and a ridge head, added"],
        ),
        ({"method": "interpolate"}, ["local, personal: 50 % of the way from the adapter before"]),
        ({"choice": "significant"}, ["another only if significantly better on own phrases"]),
    ],
    ids=str,
)
def test_before_the_run_the_personal_step_is_named(tmp_path: Path, personal: dict[str, str], lines: list[str]) -> None:
    out = StringIO()
    federation = {"rounds": 5, "training": {"learning_rate": 0.01}, "analytic": {"rounds": 1}}
    scenario = Scenario.parse({"federation": federation, "personal": personal}, "mine")
    print_scenario(scenario, tmp_path, Console(file=out, width=80), clients=6, devices=5)
    text = out.getvalue()
    for line in ("4 of 1 epoch at learning rate 0.01", "then 1 of the analytic head", *lines):
        assert line in text
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith(("base", "folder")))


def test_the_price_of_groups_is_that_of_the_devices_that_take_part(tmp_path: Path) -> None:
    out = StringIO()
    privacy = {"mechanism": "skellam", "epsilon": 8.0}
    scenario = Scenario.parse({"federation": {"aggregation": {"groups": 3}, "privacy": privacy}}, "mine")
    print_scenario(scenario, tmp_path, Console(file=out, width=80), clients=25, devices=20)
    text = "of 20 devices, one hides in a sum of 6 instead of 20, never of fewer than 6, and the mean has about 1.7 ×"
    assert text in out.getvalue()


def test_a_personal_step_that_does_not_choose_names_no_choice(tmp_path: Path) -> None:
    out = StringIO()
    scenario = Scenario.parse({"personal": {"choice": "never"}}, "mine")
    print_scenario(scenario, tmp_path, Console(file=out, width=80), clients=6, devices=5)
    assert "validation" not in out.getvalue()


def test_every_method_has_a_name() -> None:
    assert METHODS.keys() == set(get_args(MethodName))


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({}, "LoRA of rank 8, and a classification head"),
        ({"method": "dora", "rank": 2, "targets": ["key"]}, "DoRA of rank 2 on key, and a classification head"),
        ({"method": "vera", "rank": 256}, "VeRA of rank 256, and a classification head"),
        ({"bias": "all"}, "LoRA of rank 8, all biases, and a classification head"),
        ({"method": "ia3"}, "IA³, and a classification head"),
        ({"method": "prompt_tuning", "virtual_tokens": 1}, "prompt tuning with 1 virtual token, and a"),
    ],
    ids=str,
)
def test_the_adapter_is_named_with_its_size(tmp_path: Path, adapter: dict[str, Any], line: str) -> None:
    out = StringIO()
    scenario = Scenario.parse({"name": "mine", "adapter": adapter}, "mine")
    print_scenario(scenario, tmp_path, Console(file=out, width=80), clients=15, devices=12)
    assert f"adapter    {line}" in out.getvalue()


def test_no_line_is_longer_than_a_terminal_but_a_path_or_command(result: RunResult) -> None:
    lines = printed(result).splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("try"))


def test_a_pipe_gets_no_escape_sequence_and_a_terminal_does(result: RunResult) -> None:
    assert "\x1b" not in printed(result)
    assert "\x1b[" in printed(result, terminal=True)


def test_a_long_command_stays_on_one_line_quoted_for_the_shell(result: RunResult) -> None:
    bundle = "/home/some one/" + "far/" * 30 + "[bold]bundle"
    last = printed(replace(result, bundle=bundle), program=".venv/bin/edgeadapt").splitlines()[-1]
    assert last == f"try        .venv/bin/edgeadapt device infer --bundle '{bundle}' \"turn on the kitchen lights\""


def test_without_unseen_households_their_accuracy_is_a_dash(make_result: Callable[..., RunResult]) -> None:
    text = printed(make_result(4, 2, 0))
    assert text.count("–") == 4
    assert "nan" not in text


def test_a_run_whose_rounds_were_all_aborted_has_no_traffic(result: RunResult) -> None:
    gone = tuple(replace(r, survivors=(), aborted="too few", metrics={}, bytes_up=0) for r in result.rounds)
    text = printed(replace(result, rounds=gone))
    assert "nothing: every round was aborted" in text
    assert "; 10 rounds aborted" in text


@pytest.mark.parametrize("training", [0.0, float("nan")])
def test_an_unknown_training_time_is_in_that_of_the_rounds(result: RunResult, training: float) -> None:
    text = printed(replace(result, seconds={**result.seconds, "training": training}))
    assert "time       4 min 12 s; rounds with training 7.4 s" in text
