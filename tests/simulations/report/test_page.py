"""The page: it needs nothing but a browser, has the numbers, survives any name and run, and is written atomically."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from simulations.data.summary import ClientSummary, DataSummary
from simulations.report.formatting import duration, next_commands, percent, printable, privacy, share, size
from simulations.report.pages import page
from simulations.report.terminal import print_result, print_scenario
from simulations.result import GroupResult, Lesson, RunResult, dropouts_by_step
from simulations.scenario import Scenario
from tests.support.pages import outline

HOSTILE = "<script>$\\frac$</script>&\"' onload=alert(1) \x1b[31m"  # a figure shows the first sixteen characters


@pytest.fixture(scope="module")
def html(result: RunResult) -> str:
    """The page of the default result; drawing it takes a second."""
    return page(result)


def test_the_page_states_epsilon_by_round_and_in_bold_where_nothing_is_bounded(result: RunResult, html: str) -> None:
    assert "<dt>differential privacy</dt><dd><strong>none</strong><small>nothing bounds" in html
    rounds = tuple(replace(each, epsilon=0.5 * each.round) for each in result.rounds)
    found = page(replace(result, rounds=rounds, delta=1e-6))
    assert "<dd><strong>epsilon 5.00</strong><small>for delta 1e-06 after 10 rounds" in found
    assert all(f"<td>{0.5 * number:.2f}</td>" in found for number in range(1, 11))


def test_what_the_round_that_found_the_groups_told_is_stated_beside_the_other_rounds(result: RunResult) -> None:
    found = replace(result, finding=(1.234, 1e-6))
    assert privacy(found)[1].endswith("; besides, epsilon 1.23 for delta 1e-06 of the round that found the groups")
    noisy = replace(found, delta=1e-5, rounds=tuple(replace(each, epsilon=6.071) for each in result.rounds))
    amount, meaning = privacy(noisy)
    assert (amount, meaning.partition(";")[0]) == (
        "epsilon 6.07",
        "for delta 1e-05 after 10 rounds, for everything of one device",
    )


def test_the_page_loads_nothing_and_runs_nothing(html: str) -> None:
    seen = outline(html).seen
    assert "//" not in html
    assert "@import" not in html
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in seen}
    links = [value for _, attrs in seen for name, value in attrs.items() if name in ("href", "src")]
    assert links
    assert all(link and link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique_and_every_reference_has_its_target(html: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', html)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert len(ids) == len(set(ids))
    assert {first or second for first, second in used} <= set(ids)


def test_each_figure_has_a_title_a_description_and_text_as_text(html: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        assert re.search(r'role="img" aria-labelledby="\w+-title \w+-text"><title [^>]*>[^<]+</title><desc', figure)
        assert "<text" in figure
        assert "DejaVu" not in figure
    assert "en-03" in figures[0]


def test_dropouts_are_a_table_by_step(result: RunResult) -> None:
    dropped = replace(result.rounds[0], dropped={"en-01": "plan", "en-02": "unmask", "en-03": "unmask"})
    rows = re.findall(r'<th scope="row">(\w+)</th><td>(\d+)</td></tr>', page(replace(result, rounds=(dropped,))))
    assert rows == [("plan", "1"), ("unmask", "2")]


def test_the_page_ends_with_commands_for_this_run(html: str) -> None:
    text = "".join(outline(html).text)
    assert "edgeadapt device infer --bundle runs/households/devices/en-01/bundle --teach HassTurnOn" in text
    assert "edgeadapt audit verify runs/households\n" in text


def hostile(result: RunResult) -> RunResult:
    assert result.exported
    first = replace(result.clients[0], name=HOSTILE, language=HOSTILE, choice=HOSTILE)
    dropped = replace(result.rounds[0], dropped={HOSTILE: HOSTILE}, aborted=HOSTILE)
    return replace(
        result,
        scenario=HOSTILE,
        exported=replace(result.exported, bundle=HOSTILE),
        clients=(first, *result.clients[1:]),
        rounds=(dropped, *result.rounds[1:]),
    )


def test_a_hostile_name_is_escaped(result: RunResult) -> None:
    parsed = outline(page(hostile(result)))
    assert not any(tag == "script" for tag, _ in parsed.seen)
    assert HOSTILE in "".join(parsed.text)
    assert not any(name.startswith("on") for _, attrs in parsed.seen for name in attrs)


def test_equal_results_give_equal_bytes(make_result: Callable[..., RunResult], html: str) -> None:
    assert page(make_result()) == html
    assert page(make_result(clients=14)) != html


@pytest.mark.parametrize("shape", [(5, 1, 0), (3, 1, 1), (100, 100, 20)])
def test_a_run_of_any_shape_is_drawn(make_result: Callable[..., RunResult], shape: tuple[int, int, int]) -> None:
    html = page(make_result(*shape))
    outline(html)
    assert "nan" not in html.lower().replace("finance", "")
    assert len(html) < 2**20


def aborted(result: RunResult, rounds: int) -> RunResult:
    """The result with the first ``rounds`` rounds aborted."""
    gone = tuple(
        replace(r, survivors=(), aborted="4 devices are left, 8 are needed", bytes_up=0, metrics={}, version=None)
        for r in result.rounds[:rounds]
    )
    return replace(result, rounds=gone + result.rounds[rounds:])


@pytest.mark.parametrize("rounds", [1, 10])
def test_aborted_rounds_are_marked_and_the_rest_is_drawn(result: RunResult, rounds: int) -> None:
    html = page(aborted(result, rounds))
    outline(html)
    assert html.count("aborted: 4 devices are left, 8 are needed") == rounds
    assert ("nothing was published" in html) == (rounds == 10)
    assert "nan" not in html.lower()


# What a run prints: its content, at eighty columns, in a pipe and with odd names.
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


def test_the_header_has_the_price_of_groups_and_the_log(tmp_path: Path) -> None:
    out = StringIO()
    privacy = {"mechanism": "skellam", "epsilon": 8.0}
    scenario = Scenario.parse({"federation": {"aggregation": {"groups": 3}, "privacy": privacy}}, "mine")
    data = DataSummary((ClientSummary("ann", "", False, 9, 3, 3, 2, 0.0, 4.0, False),) * 25, {"on": 1}, 4, None)
    log = tmp_path / "a run" / "run.log"
    print_scenario(scenario, log, Console(file=out, width=80), data=data, devices=20)
    text = "of 20 devices, one hides in a sum of 6 instead of 20, never of fewer than 6, and the mean has about 1.7 ×"
    assert text in out.getvalue()
    assert f"log        tail -f '{log}'\n" in out.getvalue()


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


def test_a_run_of_groups_names_the_federation_of_the_first_one_for_its_audit(result: RunResult) -> None:
    exported = result.exported
    assert exported is not None
    group = GroupResult("group-1", "groups/1", ("en-01",), 1, 0, "3b" * 32)
    _, (_, command) = next_commands(replace(result, groups=(group,)), replace(exported, plain={}), "edgeadapt")
    assert command == "edgeadapt audit verify runs/households/groups/1"


def test_a_run_whose_rounds_were_all_aborted_has_no_traffic(result: RunResult) -> None:
    gone = tuple(replace(r, survivors=(), aborted="too few", metrics={}, bytes_up=0) for r in result.rounds)
    text = printed(replace(result, rounds=gone))
    assert "nothing: every round was aborted" in text
    assert "; 10 rounds aborted" in text


# Numbers as text.
@pytest.mark.parametrize(
    ("shown", "text"),
    [
        *zip(map(share, (0.8884, 1.0, 0.0, 0.9996, math.nan)), (".888", "1.000", ".000", "1.000", "–"), strict=True),
        *zip(map(size, (999, 9996, 999_600, 2.5e15)), ("999 B", "10.0 kB", "1.00 MB", "2500 TB"), strict=True),
        *zip(map(duration, (9.94, 9.96, 59.6, 3899.7)), ("9.9 s", "10 s", "1 min 00 s", "1 h 05 min"), strict=True),
        (duration(math.nan), "–"),
        (percent(263, 90_868), "0.29 %"),
        (percent(1, 1), "100 %"),
        (percent(9.96, 100), "10 %"),
        (percent(1, 0), "–"),
    ],
)
def test_a_number_has_three_digits_or_what_a_person_reads_at_once(shown: str, text: str) -> None:
    assert shown == text


def test_dropouts_are_counted_in_the_order_of_the_protocol_unknown_steps_last(result: RunResult) -> None:
    dropped = {str(number): step for number, step in enumerate(["unmask", "x", "plan", "unmask", "offer"])}
    counts = dropouts_by_step([replace(result.rounds[0], dropped=dropped)])
    assert list(counts.items()) == [("offer", 1), ("plan", 1), ("unmask", 2), ("x", 1)]


def test_control_characters_are_not_printed() -> None:
    assert printable("en-01\x1b[2J\n") == "en-01?[2J?"
