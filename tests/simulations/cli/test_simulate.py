"""`edgeadapt simulate` from scenario to report on a tiny base, and the mistakes of its users.

The module shares one finished run; each test that damages something works on its own copy.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import simulations
from aggregation.errors import ConfigError
from client.training.trainer import ClassifierTrainer
from coordinator.statedir import CoordinatorStateDir
from edgeadapt import program
from edgeadapt.bases.base import Base
from edgeadapt.formats.manifest import PrivacyBound
from export.onnx.peftmodel import SlottedModel
from export.onnx.quantize import Profile
from export.parity.compare import Parity
from simulations.engine import provision, publish
from simulations.scenario import read_scenario
from tests.simulations.data.test_tables import rows, write_csv
from tests.support import Run, refused
from tests.support.bundles import stated
from tests.support.trial import SCENARIO

Result = dict[str, Any]


@pytest.fixture(scope="module")
def scenario(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scenario") / "tiny.toml"
    two = SCENARIO.format(base=minilm).replace("public_phrases = 1", "public_phrases = 2")  # to rehearse, and to test
    path.write_text(two + "rounds = 3\naggregation.session_rounds = 2\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """Each base is traced and exported once."""
    export, exported = publish.export_classifier, dict[tuple[object, ...], object]()

    def cached(model: SlottedModel, base: Base, profile: Profile, **settings: Any) -> object:
        key = (base.digest, model.inputs.names, profile)
        if key not in exported:
            exported[key] = export(model, base, profile, **settings)
        return exported[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "export_classifier", cached)
        yield


@pytest.fixture(scope="module")
def finished(scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that went through, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "with a space"
    done = CliRunner().invoke(program.cli, ["simulate", "run", str(scenario), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.fixture
def copy(finished: tuple[Path, Result], tmp_path: Path) -> Path:
    """The finished run, to be damaged."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_only_so_many_clients_are_evaluated_and_no_other_one_gets_a_bundle(
    scenario: Path, tmp_path: Path, run: Run
) -> None:
    keys = ("evaluation.clients=3", "population.households=12", "federation.cohort.size=5", "federation.rounds=1")
    options = [word for key in keys for word in ("--set", key)]
    code, out, err = run("simulate", "run", scenario, "--out", tmp_path / "run", "--json", *options)
    assert code == 0, err
    shown = dict.fromkeys(line.split()[0] for line in err.splitlines() if line)  # in a pipe, also with --json
    assert [word for word in shown if word != "unknown"] == [
        *("Scenario", "base", "rounds", "privacy", "engine", "clients", "texts", "log"),
        *("prepare", "round", "local", "global", "personal", "export", "canaries"),
    ]
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.index("personal arm: 3 of 3 done") < log.index("export begins")
    result = json.loads(out)
    names = [client["name"] for client in result["clients"]]
    assert (len(names), sum(client["unseen"] for client in result["clients"]), result["population"]) == (3, 1, 12)
    devices = tmp_path / "run" / "devices"
    for file in ("bundle", "personal.safetensors"):
        assert sorted(path.parent.name for path in devices.glob(f"*/{file}")) == sorted(names)
    asked = 7  # over-selection: nobody else has a key
    assert len(names) <= len(list(devices.iterdir())) <= asked + len(names) < 12
    assert "3 of 12 clients" in (tmp_path / "run" / "report.html").read_text()


def test_each_language_has_a_federation_and_an_adapter_of_its_own_and_one_report_has_them_all(
    scenario: Path, tmp_path: Path, run: Run
) -> None:
    keys = (
        "population.households=12",
        'population.languages=["en", "de"]',
        "groups.by=language",
        "groups.smallest=4",
        "federation.rounds=1",
        "network.forced_dropouts=0",
        "evaluation.clients=6",
    )
    options = [word for key in keys for word in ("--set", key)]
    options += ["--engine", "protocol", "--json", "--quiet"]
    code, out, err = run("simulate", "run", scenario, "--out", tmp_path / "run", *options)
    assert (code, err) == (0, "")
    result = json.loads(out)
    groups = {group["name"]: group for group in result["groups"]}
    assert set(groups) == {"de", "en"}
    assert len({group["adapter"] for group in groups.values()}) == 2
    (joined,) = result["rounds"]
    assert len(joined["survivors"]) == sum(group["devices"] for group in groups.values())
    for name, group in groups.items():
        folder = tmp_path / "run" / group["folder"]
        (record,) = provision.registry(folder).rounds()
        assert all(survivor.startswith(name) for survivor in record.survivors)
        assert run("audit", "verify", folder)[0] == 0
    assert len(result["clients"]) == 6
    assert {client["language"] for client in result["clients"]} == {"de", "en"}


def test_a_trace_is_read_next_to_the_scenario_and_a_wrong_one_ends_the_run_before_the_first_round(
    scenario: Path, tmp_path: Path, run: Run
) -> None:
    copy = Path(shutil.copy(scenario, tmp_path / "copy.toml"))
    trace = copy.with_name("trace.csv")
    trace.write_text("client,round,available\nxx-01,1,0\n")
    code, _, err = run("simulate", "run", copy, "--out", tmp_path / "run", "--set", "network.trace=trace.csv")
    assert code != 0
    assert f"{trace}, line 2" in _one_line(err)


@pytest.mark.parametrize(
    ("keys", "share", "enough"),
    [((), 0.5, 5), (("network.forced_dropouts=2",), 0.75, 9), (("network.forced_dropouts=0",), None, 0)],
)
def test_a_run_of_which_most_rounds_would_abort_says_so_before_it_starts(
    scenario: Path, tmp_path: Path, run: Run, keys: tuple[str, ...], share: float | None, enough: int
) -> None:
    (tmp_path / "run").write_text("a file, at which the run ends")
    chosen = ("population.households=4", *keys)  # one of them is unseen
    _, _, err = run(
        "simulate", "run", scenario, "--out", tmp_path / "run", *(word for key in chosen for word in ("--set", key))
    )
    if share is None:
        assert "abort" not in err
        return
    assert f"about {share:.0%} of the rounds will abort: 3 of 3" in err
    assert f"or take population.households = {enough}\n" in err


def _undo(run_folder: Path, *stages: str) -> None:
    """Delete the outcome of the export, and of other stages, so that a resumed run has to repeat them."""
    for stage in ("bundle", "devices/*/bundle", "result.json", *stages):
        for path in run_folder.glob(stage):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _one_line(err: str) -> str:
    """The only line that is no progress."""
    (line,) = (line for line in err.splitlines() if line.startswith("edgeadapt: "))
    assert err.rstrip("\n").endswith(line)
    return line


def test_the_result_has_every_promised_key(finished: tuple[Path, Result]) -> None:
    out, result = finished
    for arm in ("base", "local", "global", "personal"):
        assert set(result["accuracy"][arm]) == {"mean", "p10", "worst", "unseen"}
        assert all(0 <= value <= 1 for value in result["accuracy"][arm].values())
    rounds = result["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2, 3]
    for entry in rounds:
        assert len(entry["dropped"]) >= 1
        assert {"survivors", "bytes_up", "bytes_down", "seconds"} <= set(entry)
    assert {entry["dropped"][device] for entry in rounds for device in entry["dropped"]} == {
        "plan",
        "survivors",
        "unmask",
    }
    by_step = [step for entry in rounds for step in entry["dropped"].values()]
    assert result["dropouts_by_step"] == {step: by_step.count(step) for step in ("plan", "survivors", "unmask")}
    assert result["device_rounds"] == sum(len({*entry["survivors"], *entry["dropped"]}) for entry in rounds)
    assert {"version", "sha256", "bytes"} <= set(result["adapter"])
    assert {"agreement", "max_abs_diff"} <= set(result["parity"])
    assert {client["choice"] for client in result["clients"]} <= {"base", "global", "personal"}
    assert set(result["reliability"]) == {"global", "personal"}
    assert all(0 <= one["before"] == one["after"] <= 1 for one in result["reliability"].values())  # few phrases
    assert Path(result["bundle"], "base", "model.onnx").is_file()
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert json.loads((out / "result.json").read_text()) == result


def test_the_phrase_to_teach_is_one_that_its_bundle_gets_wrong(finished: tuple[Path, Result], run: Run) -> None:
    lesson = finished[1]["lesson"]
    code, out, err = run("device", "infer", "--bundle", lesson["bundle"], lesson["phrase"], "--json")
    assert (code, err) == (0, "")
    assert lesson["label"] not in out


def test_a_folder_with_a_run_is_not_overwritten(finished: tuple[Path, Result], scenario: Path, run: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    code, _, err = run("simulate", "run", scenario, "--out", finished[0])
    assert code == 2
    assert "--resume" in _one_line(err)
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


@pytest.mark.slow
def test_resuming_a_finished_run_trains_nothing_and_gives_the_same_result_and_another_scenario_is_refused(
    copy: Path, finished: tuple[Path, Result], scenario: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("simulate", "run", scenario, "--out", copy, "--resume", "--set", "federation.rounds=4")
    assert code == 2
    assert "other settings" in _one_line(err)
    monkeypatch.setattr(ClassifierTrainer, "train", None)
    code, out, err = run("simulate", "run", scenario, "--out", copy, "--resume", "--json")
    assert code == 0, err
    again = json.loads(out)
    for key in ("accuracy", "rounds", "adapter", "parity"):
        assert again[key] == finished[1][key]


@pytest.mark.slow
def test_a_run_with_noise_has_the_bound_of_its_canaries_which_a_resumed_one_keeps(
    tmp_path: Path, scenario: Path, run: Run
) -> None:
    noise = ("privacy.mechanism=skellam", "privacy.noise_multiplier=0.8", "aggregation.clip_norm=0.1", "rounds=1")
    keys = (*(f"federation.{key}" for key in noise), "evaluation.clients=2", "evaluation.canaries=50")
    changes = [word for change in keys for word in ("--set", change)]
    code, out, err = run("simulate", "run", scenario, "--out", tmp_path / "run", "--json", *changes)
    assert code == 0, err
    found = json.loads(out)
    assert found["canaries"]["account"] == found["rounds"][-1]["epsilon"]
    assert 0 <= found["canaries"]["gaussian"] < found["canaries"]["account"]
    bound = PrivacyBound(found["canaries"]["account"], 1e-6)
    assert stated(tmp_path / "run" / "bundle").privacy == bound
    own = next((tmp_path / "run").glob("devices/*/bundle"))
    assert (stated(own).privacy, stated(own, "personal").privacy) == (bound, None)
    code, out, _ = run("simulate", "run", scenario, "--out", tmp_path / "run", "--resume", "--json", *changes)
    assert json.loads(out)["canaries"] == found["canaries"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"the account of {found['canaries']['account']:.2f}" in report


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_the_next_round_also_in_an_honest_but_curious_session(
    tmp_path: Path, scenario: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("federation.aggregation.adversary=honest-but-curious", "federation.rounds=2", "personal.epochs=0")
    changes = [word for change in (*short, "adapter.layers=1") for word in ("--set", change)]
    out, left, train = tmp_path / "run", iter(range(4)), ClassifierTrainer.train

    def interrupted(self: ClassifierTrainer, *rest: object, **named: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return train(self, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTrainer, "train", interrupted)
        code, printed, err = run("simulate", "run", scenario, "--out", out, *changes)
    assert code == program.INTERRUPTED
    assert "rounds     2 that train" in printed
    assert "--resume" in err
    assert len(CoordinatorStateDir.open(out / "coordinator").registry.rounds()) == 1
    assert [*(out / "states").glob("*/rows.float16")]
    code, printed, err = run("simulate", "run", scenario, "--out", out, "--resume", "--json", *changes)
    assert code == 0, err
    assert not (out / "states").exists()
    rounds = json.loads(printed)["rounds"]
    assert [(entry["round"], entry["aborted"]) for entry in rounds] == [(1, None), (2, None)]
    assert {step for entry in rounds for step in entry["dropped"].values()} == {"plan", "unmask"}


def test_a_table_becomes_a_report_in_one_command(run: Run, minilm: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "run", write_csv(tmp_path / "My Texts.csv", rows())
    words = ("--set", "data.client=user", "--set", f"base.model={minilm}", "--set", "federation.rounds=2")
    more = ("--set", "network.forced_dropouts=0", "--set", "export.minimum_agreement=0.5", "--out", out)
    code, printed, err = run("simulate", "run", table, *words, *more)
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    assert (result["scenario"], len(result["clients"])) == ("my-texts", 8)
    assert {round_["version"] for round_ in result["rounds"]} == {1, 2}
    assert '"a text of your own"' in printed
    report = (out / "report.html").read_text()
    assert not any(row["text"] in report or row["text"] in printed for row in rows())


@pytest.mark.slow
def test_a_pair_below_the_parity_gate_is_not_published(
    copy: Path, scenario: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _undo(copy)
    monkeypatch.setattr(publish.compare, "compare", lambda *_, **__: Parity(0.4, 0.9, 36))
    code, _, err = run("simulate", "run", scenario, "--out", copy, "--resume")
    assert code == 6
    assert "40" in _one_line(err)
    assert not (copy / "bundle").exists()


def test_a_shipped_scenario_is_found_by_its_name_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_scenario(Path("households.toml"), ()).name == "households"
    Path("households.toml").write_text('name = "mine"', encoding="utf-8")
    assert read_scenario(Path("households.toml"), ()).name == "mine"
    Path("texts.csv").write_text("text,label\na,b\n", encoding="utf-8")
    assert read_scenario(Path("texts.csv"), ()).base.languages == ()  # not pruned to the demo's languages
    with refused(ConfigError, "nowhere.toml"):
        read_scenario(Path("nowhere.toml"), ())


# `edgeadapt simulate look`, and mistakes in a table of one's own.
@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "My Texts.csv", rows())


def test_the_clients_of_a_table_are_shown(run: Run, table: Path) -> None:
    code, out, err = run("simulate", "look", table, "--set", "data.client=user", "--set", "data.language=lang")
    assert (code, err) == (0, "")
    assert "8, 2 of them unseen" in out
    assert "de 4, en 4" in out
    dealt = run("simulate", "look", table, "--set", "data.clients=6", "--set", "data.minimum_texts=3")[1]
    assert ["dealt out to them: name the column" in text for text in (out, dealt)] == [False, True]


def test_with_json_the_same_is_one_object_and_broken_rows_are_listed(run: Run, tmp_path: Path) -> None:
    made = rows()
    made[5]["text"] = ""
    path = write_csv(tmp_path / "texts.csv", made)
    code, out, _ = run("simulate", "look", path, "--set", "data.client=user", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["facts"]["broken"] == [f"{path}:7: text is empty"]
    assert len(found["clients"]) == 8
    assert set(found["labels"]) == {"greet", "part", "ask"}
    assert found["unknown"] == 0


GERMAN = "schalte bitte das Licht im Wohnzimmer aus und mach die Heizung im Schlafzimmer etwas wärmer"


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        (" ".join(chr(0x1200 + 7 * number) * 3 for number in range(15)), "of the tokens, at most 100.0 %"),
        (GERMAN, "the words of 8 of 8 clients are spelled out"),
        ("", ""),
    ],
    ids=["unknown letters", "unknown words", "English"],
)
def test_a_language_that_the_base_cannot_read_is_said(run: Run, tmp_path: Path, sentence: str, said: str) -> None:
    made, words = rows(each=20), sentence.split()
    for number, row in enumerate(made if words else ()):
        row["text"] = " ".join(words[(number * step) % len(words)] for step in (1, 2, 4, 7, 11))
    path = write_csv(tmp_path / "texts.csv", made)
    code, out, _ = run("simulate", "look", path, "--set", "data.client=user", "--set", "data.near_duplicates=1")
    assert code == 0
    assert said in out
    assert ("this base hardly reads them" in out) is bool(words)


def test_what_is_shipped_is_listed_and_named_where_a_name_is_mistyped(run: Run) -> None:
    code, out, err = run("simulate", "look", "--json")
    assert (code, err) == (0, "")
    for kind, command in (("scenarios", "run"), ("suites", "suite")):
        shipped = json.loads(out)[kind]
        assert sorted(shipped) == sorted(path.name for path in (Path(simulations.__file__).parent / kind).iterdir())
        assert min(map(len, shipped.values())) > 20
        code, _, err = run("simulate", command, "household.toml")
        assert (code, err.count("\n")) == (2, 1)
        assert "household.toml" in err
        assert ", ".join(shipped) in err
