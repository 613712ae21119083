"""The comparison of several runs."""

import json
import sys
from pathlib import Path

import pytest

import edgeadapt
from aggregation.errors import ConfigError, DataError
from simulations.report.result import ARMS
from simulations.report.seeds import Spread, markdown, read_results, spreads
from tests.support import refused


def _run(folder: Path, seed: int, personal: float, scenario: str = "households") -> Path:
    figures = dict.fromkeys(("mean", "p10", "worst", "unseen"), 0.5)
    accuracy = {arm: dict(figures) for arm in ARMS}
    accuracy["personal"]["mean"] = personal
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"scenario": scenario, "seed": seed, "accuracy": accuracy}))
    return folder


def test_a_spread_is_mean_and_range_over_the_runs(tmp_path: Path) -> None:
    folders = [_run(tmp_path / str(seed), seed, value) for seed, value in enumerate((0.7, 0.8, 0.9))]
    results = read_results(folders)
    found = spreads(results)["personal"]["mean"]
    assert found == Spread(pytest.approx(0.8), 0.7, 0.9)
    assert "| personal | 0.800 (0.700 – 0.900) | 0.500" in markdown(results)


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first = _run(tmp_path / "a", 0, 0.7)
    with refused(ConfigError, "seed"):
        read_results([first, _run(tmp_path / "b", 0, 0.8)])
    with refused(ConfigError, "scenario"):
        read_results([first, _run(tmp_path / "c", 1, 0.8, "other")])
    with refused(ConfigError, "result.json"):
        read_results([tmp_path / "absent"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"accuracy": 1}', '{"scenario": "x", "seed": 0, "accuracy": {}}'])
def test_a_damaged_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with refused(DataError, "result.json"):
        read_results([tmp_path])


def test_the_command_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(_run(tmp_path / str(seed), seed, 0.7)) for seed in range(3)]
    monkeypatch.setattr(sys, "argv", ["edgeadapt", "seeds", *folders])
    with pytest.raises(SystemExit) as ended:
        edgeadapt.main()
    assert not ended.value.code
    assert "3 seeds" in capsys.readouterr().out
