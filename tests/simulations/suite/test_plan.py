"""What a suite computes, in which order, and how an arm's constants are chosen."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError, DataError
from simulations.plan import Suite, SuiteSettings, Trial, search
from simulations.result import TrialResult
from simulations.shipped import SUITES
from simulations.suite.execute import pending
from simulations.suite.store import FINISHED, Store, read_suite, results, taken
from tests.support import refused

SuiteOf = Callable[..., Suite]
ResultOf = Callable[..., TrialResult]
LOCAL = {"kind": "local", "search": {"local.learning_rate": [0.01, 0.03], "personal.epochs": [1, 2]}}


def the(suite: Suite, arm: str, seed: int = 0, **constants: Any) -> Trial:
    return suite.trial(arm, seed, {k.replace("__", "."): v for k, v in constants.items()})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_suite_is_valid_and_named_like_its_file(path: Path) -> None:
    texts = ['data.files=["texts.jsonl"]'] if path.stem == "authors" else []
    suite = read_suite(path, changes=texts)
    assert suite.settings.name == path.stem
    assert read_suite(Path(path.name), changes=texts) == suite


def test_a_suite_of_texts_that_nobody_named_is_refused_before_it_runs() -> None:
    with refused(ConfigError, "data.files"):
        read_suite(Path("authors.toml"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"compare": [["local", "nobody"]]}, "nobody"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": [7]}, "seed 7"),
        ({"set": {"seed": 3}}, "seed"),
        ({"arms": {}}, "arms"),
        ({"arms": {"local": {"kind": "local", "search": {"personal.epochs": []}}}}, "search"),
    ],
)
def test_a_wrong_suite_is_named_in_one_line(change: dict[str, Any], named: str, suite_of: SuiteOf) -> None:
    table = {"arms": {"local": LOCAL}, **change}
    with pytest.raises(ConfigError, match=re.escape(named)) as error:
        suite_of(**table)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["federation.round", "personal", "local.learning_rate"])
def test_a_wrong_key_of_an_arm_is_found_before_anything_runs(key: str, suite_of: SuiteOf) -> None:
    suite = suite_of({"a": {"kind": "base"}, "local": {"kind": "local", "search": {key: [0.1, -1]}}})
    with pytest.raises(ConfigError, match=f"arm 'local': .*{key}"):
        suite.check()


def test_pairs_are_every_arm_with_the_baseline_and_the_further_ones_once() -> None:
    arms = {name: {"kind": "base"} for name in "abc"}
    table = {"scenario": "x", "arms": arms, "baseline": "b", "compare": [["a", "c"], ["a", "b"]]}
    assert SuiteSettings.parse(table, "test").pairs == (("a", "b"), ("c", "b"), ("a", "c"))


def test_an_override_of_the_command_comes_after_the_suites_and_before_an_arms(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    arms = '[arms.one]\nkind = "local"\n[arms.two]\nkind = "local"\nset = {"personal.epochs" = 7}\n'
    file.write_text(f'scenario = "households.toml"\nseeds = [0]\nset = {{"personal.epochs" = 5}}\n{arms}')
    suite = read_suite(file, changes=["personal.epochs=6", "population.languages=['en']"])
    assert [the(suite, name).scenario.personal.epochs for name in ("one", "two")] == [6, 7]
    assert the(suite, "one").scenario.population.languages == ("en",)


def test_some_arms_are_compared_among_themselves() -> None:
    suite = read_suite(Path("households.toml"), arms=["both", "personal", "global"])
    assert list(suite.settings.arms) == ["both", "global", "personal"]
    assert suite.settings.pairs == (("personal", "both"), ("personal", "global"))
    assert read_suite(Path("households.toml"), arms=["local", "base"]).settings.pairs == (("base", "local"),)


def test_a_trial_is_named_by_all_that_its_result_depends_on(suite_of: SuiteOf) -> None:
    suite = suite_of({"local": {"kind": "local"}, "base": {"kind": "base"}})
    trial = the(suite, "local")
    assert the(suite, "local", name="other").digest == trial.digest
    others = [the(suite, "local", 1), the(suite, "base"), the(suite, "local", local__learning_rate=0.5)]
    assert len({trial.digest, *(other.digest for other in others)}) == 4


def test_arms_share_the_rounds_unless_a_key_that_rounds_depend_on_differs(suite_of: SuiteOf) -> None:
    suite = suite_of({"global": {"kind": "global"}, "personal": {"kind": "personal"}, "local": {"kind": "local"}})
    rounds = the(suite, "global").federation
    assert the(suite, "local").federation == ""
    for key in ("personal__epochs", "head__ridge"):
        assert the(suite, "personal", **{key: 7}).federation == rounds
    assert the(suite, "personal", export__profile="fp32").federation == rounds
    for change in ({"federation__rounds": 3}, {"adapter__rank": 2}):
        assert the(suite, "personal", **change).federation != rounds
    assert the(suite, "personal", 1).federation != rounds


def test_a_search_takes_the_best_on_validation_and_never_looks_at_the_test(
    suite_of: SuiteOf, store: Store, result_of: ResultOf
) -> None:
    suite = suite_of({"local": LOCAL}, search={"seeds": [7, 8], "set": {"federation.rounds": 2}})
    arm = suite.settings.arms["local"]
    quality = {0.01: {1: (5, 1.0), 2: (7, 1.0)}, 0.03: {1: (7, 0.5), 2: (7, 0.5)}}  # right of ten, loss
    for constants in arm.candidates():
        right, loss = quality[constants["local.learning_rate"]][constants["personal.epochs"]]  # type: ignore[index]
        for number, trial in enumerate(suite.candidate("local", constants)):
            assert trial.scenario.federation.rounds == 2
            assert search(suite, "local", store.get) is None
            shift = 1 if number else -1
            store.put(trial, result_of(10 - right, 10 - right, validation=right + shift, loss=loss))
    found = search(suite, "local", store.get)
    assert found is not None
    # Both candidates at 0.03 are equal, and better than 0.01 with two epochs by their loss: the first is taken.
    assert found.constants == {"local.learning_rate": 0.03, "personal.epochs": 1}
    assert [score for _, score in found.scores] == pytest.approx([0.5, 0.7, 0.7, 0.7])
    assert found.cpu_seconds == 16.0


def test_a_candidate_that_fails_is_not_chosen_and_if_all_fail_the_suite_says_so(
    suite_of: SuiteOf, store: Store, result_of: ResultOf
) -> None:
    suite = suite_of({"local": {"kind": "local", "search": {"local.learning_rate": [0.9, 0.1]}}})
    diverges, works = (suite.candidate("local", c) for c in suite.settings.arms["local"].candidates())
    store.put(diverges[0], "the training loss is not finite")
    store.put(works[0], result_of(1, 2, validation=0))
    found = search(suite, "local", store.get)
    assert found is not None
    assert found.constants == {"local.learning_rate": 0.1}
    assert found.scores[0][1] is None
    store.forget(works[0])
    store.put(works[0], "not finite either")
    with pytest.raises(ConfigError, match="'local' failed"):
        search(suite, "local", store.get)


def test_a_search_without_validation_texts_is_refused(suite_of: SuiteOf, store: Store) -> None:
    from simulations.result import ClientScore, Cost, Tally

    suite = suite_of({"local": {"kind": "local", "search": {"personal.epochs": [1, 2]}}})
    nothing = Tally("", 0.0)
    empty = TrialResult((ClientScore("a", False, nothing, Tally("1", 0.1), nothing),), Cost(1, 1, 1.0))
    for constants in suite.settings.arms["local"].candidates():
        store.put(suite.candidate("local", constants)[0], empty)
    with pytest.raises(ConfigError, match="no client has a validation text"):
        search(suite, "local", store.get)


def test_searches_come_before_their_arm_and_rounds_before_what_follows_them(
    suite_of: SuiteOf, store: Store, result_of: ResultOf
) -> None:
    suite = suite_of(
        {"personal": {"kind": "personal", "search": {"personal.epochs": [1, 2]}}, "global": {"kind": "global"}},
        seeds=[0],
    )
    done = []
    while jobs := pending(suite, store):
        assert len({job.key for job in jobs}) == len(jobs)
        job = next(job for job in jobs if job.ready)
        done.append((job.label, job.rounds))
        if job.rounds:
            store.federation(job.trial).mkdir(parents=True)
            (store.federation(job.trial) / FINISHED).write_text("{}")
        else:
            store.put(job.trial, result_of(5, 6))
    assert done == [
        ("personal, candidate 1 of 2", True),  # once for both candidates
        ("personal, candidate 1 of 2", False),
        ("personal, candidate 2 of 2", False),
        ("personal, seed 0", True),  # once for both arms
        ("personal, seed 0", False),
        ("global, seed 0", False),
    ]
    assert set(results(suite, store)) == {"personal", "global"}


def test_an_arm_that_failed_is_a_result_unless_it_is_the_only_one(
    suite_of: SuiteOf, store: Store, result_of: ResultOf
) -> None:
    search_too = {"personal.epochs": [1, 2]}
    suite = suite_of({"base": {"kind": "base"}, "local": {"kind": "local", "search": search_too}}, seeds=[0, 1])
    for seed, outcome in {0: result_of(1), 1: "the disk is full"}.items():
        store.put(the(suite, "base", seed), outcome)
    for constants in suite.settings.arms["local"].candidates():
        store.put(suite.candidate("local", constants)[0], "the loss is not finite")
    assert pending(suite, Store(store.path)) == []
    with pytest.raises(DataError, match=r"arm 'base' failed with seed 1 \(and 2 more\): the disk is full"):
        results(suite, Store(store.path))
    store.put(the(suite, "base", 1), result_of(2))
    base, local = (by_seed for _, by_seed in results(suite, store).values())
    assert base == {0: result_of(1), 1: result_of(2)}
    assert all("not finite" in str(outcome) for outcome in local.values())


@pytest.mark.parametrize("damage", [b"{}", b'{"clients": []'])
def test_a_damaged_result_is_named(damage: bytes, suite_of: SuiteOf, store: Store, result_of: ResultOf) -> None:
    trial = the(suite_of({"base": {"kind": "base"}}), "base")
    store.put(trial, result_of(3, 4))
    assert Store(store.path).get(trial) == result_of(3, 4)
    file = next((store.path / "results").iterdir())
    file.write_bytes(damage)
    with refused(DataError, file.name):
        Store(store.path).get(trial)


def test_a_suite_goes_on_only_with_the_texts_that_it_began_with(tmp_path: Path) -> None:
    texts, folder, out = tmp_path / "texts.csv", tmp_path / "more", tmp_path / "out"
    folder.mkdir()
    for file in (texts, folder / "a.txt"):
        file.write_text("text,label,client\nhello,greet,anna\n")
    (tmp_path / "mine.toml").write_text('[data]\nfiles = ["texts.csv", "more"]\nclient = "client"\n')
    (tmp_path / "suite.toml").write_text('scenario = "mine.toml"\nseeds = [0]\n[arms.base]\nkind = "base"\n')
    suite = read_suite(tmp_path / "suite.toml")
    with taken(out, suite, resume=False):
        pass
    with taken(out, read_suite(tmp_path / "suite.toml", seeds=2), resume=True):
        pass
    for change in (texts, folder / "a.txt", folder / "b.txt"):
        before = change.read_text() if change.exists() else None
        change.write_text("text,label,client\nbye,part,anna\n")
        with refused(ConfigError, "--out"), taken(out, suite, resume=True):
            pass
        change.unlink() if before is None else change.write_text(before)
    with taken(out, suite, resume=True):
        pass
    (out / "suite.json").write_text("{}")
    with refused(ConfigError, "suite.json"), taken(out, suite, resume=True):
        pass
