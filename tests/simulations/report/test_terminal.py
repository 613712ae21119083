"""What a run prints: its content, at eighty columns, in a pipe and with odd names."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich.console import Console

from simulations.data.summary import ClientSummary, DataSummary
from simulations.report.terminal import print_result, print_scenario
from simulations.result import Lesson, RunResult
from simulations.scenario import Scenario


def printed(result: RunResult, *, terminal: bool = False, program: str = "edgeadapt") -> str:
    out = StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system="standard" if terminal else None)
    print_result(result, console, program)
    return out.getvalue()


def test_the_table_has_every_arm_with_its_four_numbers(result: RunResult) -> None:
    lines = [line.split() for line in printed(result).splitlines()]
    rows = {words[0]: words[1:5] for words in lines if words}
    assert rows["base"] == [".446", ".400", ".275", ".383"]
    assert rows["personal"] == [".856", ".825", ".800", ".892"]
    assert {"local", "global"} <= set(rows)


def test_the_header_has_the_price_of_groups_and_the_log_and_with_verbose_also_the_arms(tmp_path: Path) -> None:
    out = StringIO()
    privacy = {"mechanism": "skellam", "epsilon": 8.0}
    scenario = Scenario.parse({"federation": {"aggregation": {"groups": 3}, "privacy": privacy}}, "mine")
    data = DataSummary((ClientSummary("ann", "", False, 9, 3, 3, 2, 0.0, 4.0, False),) * 25, {"on": 1}, 4, None)
    log = tmp_path / "a run" / "run.log"
    print_scenario(scenario, log, Console(file=out, width=80), data=data, devices=20)
    text = "of 20 devices, one hides in a sum of 6 instead of 20, never of fewer than 6, and the mean has about 1.7 ×"
    assert text in out.getvalue()
    assert f"log        tail -f '{log}'\n" in out.getvalue()
    short = out.getvalue()
    print_scenario(scenario, log, Console(file=out, width=80), data=data, devices=20, verbose=True)
    assert {"arms", "adapter", "labels"} <= {
        line.split(" ")[0] for line in out.getvalue().removeprefix(short).splitlines()
    }
    assert "arms" not in short


def test_a_pipe_gets_no_escape_sequence_and_a_terminal_does(result: RunResult) -> None:
    assert "\x1b" not in printed(result)
    assert "\x1b[" in printed(result, terminal=True)


def test_the_end_names_three_commands_each_on_one_line_quoted_for_the_shell(result: RunResult) -> None:
    bundle = "/home/some one/" + "far/" * 30 + "devices/en-01/[bold]bundle"
    assert result.exported
    lesson = Lesson(bundle, "it's dark", "HassTurnOn")
    exported = replace(result.exported, bundle=bundle, lesson=lesson, report="a run/report.html")
    last = printed(replace(result, exported=exported), program=".venv/bin/edgeadapt").splitlines()[-6:]
    assert [line.strip() for line in last[1::2]] == [
        f".venv/bin/edgeadapt device infer --bundle '{bundle}' --teach HassTurnOn 'it'\"'\"'s dark'",
        ".venv/bin/edgeadapt audit verify 'a run'",
        ".venv/bin/edgeadapt new mine",
    ]
    own = replace(exported, lesson=None, plain={}, phrase="a text of your own")
    assert "device infer" in printed(replace(result, exported=own)).splitlines()[-3]


def test_a_run_whose_rounds_were_all_aborted_has_no_traffic(result: RunResult) -> None:
    gone = tuple(replace(r, survivors=(), aborted="too few", metrics={}, bytes_up=0) for r in result.rounds)
    text = printed(replace(result, rounds=gone))
    assert "nothing: every round was aborted" in text
    assert "; 10 rounds aborted" in text
