"""A map: the same arms at every combination of a few places, and where the first of them is better than the others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from aggregation.errors import ConfigError
from edgeadapt import program
from simulations.plan import SearchOutcome, Suite, SuiteSettings
from simulations.report.map import MapSummary, write_map
from simulations.report.summary import SuiteSummary, summarize
from simulations.result import TrialResult

NONE = SearchOutcome({}, (), 0.0)
ARMS = {"ours": {"kind": "global"}, "ridge": {"kind": "ridge-head"}, "local": {"kind": "local"}}
FEW_AND_MANY = {"few": {"population.households": 10}, "many": {"population.households": 40}}
VARY = {"texts": {"6": {"population.utterances_min": 6, "population.utterances_max": 7}}, "households": FEW_AND_MANY}
PAIRS = [["ours", "ridge"], ["ours", "local"]]
SuiteOf = Callable[..., Suite]
ResultOf = Callable[..., TrialResult]


def test_a_cell_is_the_suite_with_the_overrides_of_its_place(suite_of: SuiteOf) -> None:
    suite = suite_of(ARMS, vary=VARY, compare=PAIRS, set={"population.households": 20, "personal.epochs": 1})
    scenarios = {place: cell.trial("ours", 0, {}).scenario for place, cell in suite.cells.items()}
    assert {place: one.population.households for place, one in scenarios.items()} == {
        ("6", "few"): 10,
        ("6", "many"): 40,
    }
    assert all((one.population.utterances_max, one.personal.epochs) == (7, 1) for one in scenarios.values())
    assert len(list(suite.reported())) == 2 * 3 * 2  # cells, arms, seeds


def test_a_suite_without_places_is_its_only_cell(suite_of: SuiteOf) -> None:
    suite = suite_of(ARMS)
    assert {place: cell.settings for place, cell in suite.cells.items()} == {(): suite.settings}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"compare": []}, "vary"),
        ({"vary": {"a": {}}}, "vary"),
        ({"vary": dict.fromkeys("abcd", FEW_AND_MANY)}, "vary"),
        ({"vary": {"a": {"b": {"population.nothing": 1}}}}, "population.nothing"),
    ],
)
def test_a_wrong_map_is_refused_before_it_runs(suite_of: SuiteOf, change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        suite_of(ARMS, **{"vary": VARY, "compare": PAIRS} | change).check()
    assert named in f"{caught.value.about} {caught.value}"


def _cell(settings: SuiteSettings, result_of: ResultOf, ours: int, ridge: int, local: int) -> SuiteSummary:
    right = {"ours": ours, "ridge": ridge, "local": local}
    made = {name: (NONE, {s: result_of(*[n, n + 1] * 6, unseen=6) for s in (0, 1)}) for name, n in right.items()}
    return summarize(settings, made)


def test_each_cell_names_the_strongest_other_arm_and_the_gain_over_it(
    suite_of: SuiteOf, result_of: ResultOf, tmp_path: Path
) -> None:
    settings = suite_of(ARMS, vary=VARY, compare=PAIRS).settings
    cells = {("6", "few"): _cell(settings, result_of, 6, 3, 5), ("6", "many"): _cell(settings, result_of, 4, 7, 5)}
    summary = MapSummary.of(settings, cells)
    assert [row[1:4] for row in summary.rows()] == [
        [".650", "local .550", "+10.0 (10.0 to 10.0)"],
        [".450", "ridge .750", "-30.0 (-30.0 to -30.0)"],
    ]
    assert summary.headline().endswith("in 1 of 2 cells, worse in 1, and within noise in 0.")
    write_map(summary, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert 'href="cell-2.html"' in page
    assert all(f">{gain}<" in page for gain in ("+10.0", "-30.0"))  # the tiles
    assert "ridge" in (tmp_path / "cell-2.html").read_text()
    stored = json.loads((tmp_path / "report.json").read_bytes())
    assert [(one["place"]["households"], one["strongest"]) for one in stored["cells"]] == [
        ("few", "local"),
        ("many", "ridge"),
    ]


def test_a_cell_without_the_arm_is_said_to_have_failed(suite_of: SuiteOf, result_of: ResultOf, tmp_path: Path) -> None:
    settings = suite_of(ARMS, vary=VARY, compare=PAIRS).settings
    outcome = {0: "it diverged", 1: "it diverged"}
    made = {name: (NONE, outcome if name == "ours" else {s: result_of(*[5] * 8) for s in (0, 1)}) for name in ARMS}
    cells = {("6", "few"): summarize(settings, made), ("6", "many"): _cell(settings, result_of, 6, 3, 5)}
    summary = MapSummary.of(settings, cells)
    assert summary.rows()[0] == ["6 · few", "failed", "–", "–", "–"]
    assert summary.headline().endswith("in 1 of 2 cells, worse in 0, and within noise in 0; 1 could not be compared.")
    write_map(summary, tmp_path)
    assert "failed" in (tmp_path / "report.md").read_text()


def test_the_command_runs_a_map_in_one_folder_and_goes_on_with_it(scenario_file: Path, tmp_path: Path) -> None:
    file, out = scenario_file.with_name("map.toml"), tmp_path / "map"
    file.write_text(
        'scenario = "tiny.toml"\nseeds = [0]\ncompare = [["ridge", "base"]]\n'
        'vary.texts.few = {"population.utterances_min" = 6, "population.utterances_max" = 8}\n'
        'vary.texts.more = {"population.utterances_min" = 20, "population.utterances_max" = 30}\n'
        'arms.base.kind = "base"\narms.ridge.kind = "ridge-head"\n'
    )
    for more in ((), ("--resume",)):
        words = ["simulate", "suite", str(file), "--out", str(out), "--jobs", "1", "--json", "--quiet", *more]
        result = CliRunner().invoke(program.cli, words)
        assert not result.exit_code, result.output
        assert [cell["place"] for cell in json.loads(result.stdout)["cells"]] == [{"texts": "few"}, {"texts": "more"}]
    assert len(list((out / "results").iterdir())) == 4
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
