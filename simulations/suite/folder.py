"""Start, continue and read a suite in its folder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from adapters import jsontext
from adapters.base import find_base
from adapters.storage import PUBLIC, file_sha256, read, replace
from aggregation.errors import ConfigError
from simulations.scenario import Scenario
from simulations.suite.plan import Suite, digest_of
from simulations.suite.settings import SuiteSettings
from simulations.suite.store import Store

SUITE = "suite.json"
LARGEST = 2**20  # bytes of it
SHIPPED_SUITES = Path(__file__).parents[1] / "suites"
SHIPPED_SCENARIOS = Path(__file__).parents[1] / "scenarios"


def read_suite(path: Path, *, seeds: int | None = None, changes: Sequence[str] = (), arms: Sequence[str] = ()) -> Suite:
    """The suite in a file, or one that is shipped under this name.

    Args:
        path: TOML.
        seeds: If given, so many seeds from 0 on in place of the file's.
        changes: ``KEY=VALUE`` of the scenario, for every arm; they come after those of the suite.
        arms: If given, only these of its arms.

    Raises:
        ConfigError: It, its scenario or an arm is missing, or a key or a value of a trial is wrong.
    """
    path = _or_shipped(path, SHIPPED_SUITES)
    settings = SuiteSettings.read(path).with_overrides(changes)
    settings = settings.with_arms(arms) if arms else settings
    named = _or_shipped(path.parent / settings.scenario, SHIPPED_SCENARIOS)
    scenario = Scenario.read(named).located(named.parent)
    suite = Suite(settings if seeds is None else settings.with_seeds(seeds), _table(scenario), named.parent)
    suite.check()
    return suite


def open_suite(out: Path) -> Suite:
    """The suite that was run in a folder.

    Raises:
        ConfigError: It is missing, or what the folder states of it is damaged.
    """
    file = out / SUITE
    try:
        stored = jsontext.decode(read(file, LARGEST))
        settings, scenario = stored["settings"], Scenario.parse(stored["scenario"], str(file))
        return Suite(SuiteSettings.parse(settings, str(file)), _table(scenario), Path(stored["folder"]))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{out} contains no suite: run one with 'edgeadapt suite run'", about="DIR") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is damaged: run the suite again with --resume", about=SUITE) from error


@contextmanager
def taken(out: Path, suite: Suite, *, resume: bool) -> Iterator[Store]:
    """The folder of a suite for the duration of the block.

    Args:
        out: New or empty; with ``resume``, the folder of a suite. Outcomes that this suite needs as well are kept.
        suite: To run.
        resume: Whether to continue. What failed is tried again.

    Raises:
        ConfigError: The folder contains something else, another process uses it, or it was begun with another content
            of a file that the suite names.
        OSError: Such a file cannot be read.
    """
    started = (out / SUITE).exists()
    if started and not resume:
        raise ConfigError(
            f"{out} contains a suite: add --resume to continue it, or choose another --out", about="--out"
        )
    if not started and out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another --out", about="--out")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            content = _same_content(out / SUITE, suite) if started else _content(suite)
            table = {"settings": suite.settings.model_dump(mode="json"), "scenario": suite.scenario, "content": content}
            replace(out / SUITE, json.dumps({**table, "folder": str(suite.folder)}, indent=2).encode(), PUBLIC)
            store = Store(out)
            _forget_failures(suite, store)
            yield store
    except Timeout as error:
        raise ConfigError(f"another process runs a suite in {out}: wait for it, or choose another --out") from error


def _same_content(file: Path, suite: Suite) -> dict[str, str]:
    """What the suite in ``file`` and this one name, with digests. Raises ConfigError if the content of any differs."""
    try:
        before: dict[str, str] = jsontext.decode(read(file, LARGEST))["content"]
        now = _content(suite)
        changed = [name for name, digest in now.items() if before.get(name, digest) != digest]
    except (KeyError, AttributeError, ValueError) as error:
        raise ConfigError(f"{file} is damaged: choose another --out", about=SUITE) from error
    if changed:
        raise ConfigError(f"{changed[0]} is not what it was when this suite began: choose another --out", about="--out")
    return before | now


def _content(suite: Suite) -> dict[str, str]:
    """The bases and files that a suite names → digests of their content."""
    found: dict[str, str] = {}
    for name, arm in suite.settings.arms.items():
        for constants in arm.candidates():
            for _, trial in suite.trials(name, constants):
                scenario = trial.scenario
                found.setdefault(scenario.base.model, find_base(scenario.base.model).digest)
                for place in (*scenario.data.files, *scenario.data.public, scenario.network.trace):
                    if place and place not in found:
                        found[place] = _digest(Path(place))
    return found


def _digest(place: Path) -> str:
    if not place.is_dir():
        return file_sha256(place)
    files = sorted(file for file in place.rglob("*") if file.is_file())
    return digest_of({file.relative_to(place).as_posix(): file_sha256(file) for file in files})


def _forget_failures(suite: Suite, store: Store) -> None:
    for name, arm in suite.settings.arms.items():
        for constants in arm.candidates():
            for _, trial in suite.trials(name, constants):
                if isinstance(store.get(trial), str):
                    store.forget(trial)


def _table(scenario: Scenario) -> dict[str, object]:
    table: dict[str, object] = scenario.model_dump(mode="json")
    return table


def _or_shipped(path: Path, shipped: Path) -> Path:
    """The path, or the shipped file of that name if it does not exist."""
    return path if path.exists() or not (shipped / path.name).exists() else shipped / path.name
