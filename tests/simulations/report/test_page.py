"""The page: it needs nothing but a browser, has the numbers, survives any name and run, and is written atomically."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from simulations.report.pages import page
from simulations.result import RunResult
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
    assert len(figures) == 4
    for figure in figures:
        assert re.search(r'role="img" aria-labelledby="\w+-title \w+-text"><title [^>]*>[^<]+</title><desc', figure)
        assert "<text" in figure
        assert "DejaVu" not in figure
    assert "en-03" in figures[0]


def test_a_device_that_did_not_take_part_is_in_the_legend(result: RunResult, html: str) -> None:
    first = result.rounds[0]
    late = replace(first, survivors=first.survivors[1:])
    assert "did not take part" not in html
    assert "did not take part" in page(replace(result, rounds=(late, *result.rounds[1:])))


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
    assert "did not take part" not in html
    assert "nan" not in html.lower()
