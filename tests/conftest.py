"""A tiny frozen base and a fleet of a few devices around it, for every part that needs them.

Torch and Flower are imported by what uses them, so that other tests do not wait for them.
"""

import os
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tomli_w

from tests.support.traces import collect_rarely, keep_traces
from tests.support.verified import forget_verified

# How long an example takes says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
collect_rarely()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # from a shell's background, and programs under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
LONG = 60  # seconds, of a run of which the time of each folder is shown
LONGEST = {  # files of half a minute and more, most of it in one test
    *("test_deploy_page.py", "test_faults.py", "test_fleet_page.py"),
    *("test_suite_command.py", "test_tutorials.py"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the cases that are left to `make exhaustive` too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files come first, then the slow ones, so that no worker begins one when the others have no more."""
    if not config.getoption("--exhaustive"):
        left = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    keep_traces()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The time of each folder of tests, in seconds of a worker."""
    spent = Counter[str]()
    reports = [each for found in terminalreporter.stats.values() for each in found]
    for report in reports:
        if isinstance(report, pytest.TestReport):
            spent[report.nodeid.split("::")[0].split("/")[1]] += report.duration
    if sum(spent.values()) > LONG:
        terminalreporter.section("seconds of a worker, by folder")
        for folder, seconds in spent.most_common():
            terminalreporter.write_line(f"{seconds:6.0f}  {folder}")


@pytest.fixture(scope="session", autouse=True)
def without_syncs() -> Iterator[None]:
    """No test cuts the power, and to wait for the disk takes a third of the time of a fleet's rounds.

    Tests of what is synced, and of a disk that is full, put a function of their own in its place.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # refuses what is not an open file
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """``edgeadapt`` in this process: exit code, standard output, standard error."""
    from edgeadapt import program

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeadapt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def nothing_verified_before() -> None:
    """Let each test verify for itself what an earlier one verified: some take a check away."""
    forget_verified()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Any]:
    """A PostgreSQL server, whose password is not in the environment."""
    from tests.support.postgresql import Server

    server = Server.create()
    yield server
    server.remove()


@pytest.fixture
def postgresql(postgresql_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a new database, which ends with the test, as do connections to it that no one has closed. The
    environment has the password."""
    monkeypatch.setenv("PGPASSWORD", postgresql_server.password)
    name = postgresql_server.database()
    yield postgresql_server.url(name)
    postgresql_server.run("postgres", f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[Any]:
    """A server of S3's protocol."""
    from tests.support.bucket import Server

    server = Server.create()
    yield server
    server.stop()


@pytest.fixture
def bucket(bucket_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a new bucket. The environment has the keys, and says where the server is."""
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    address: str = bucket_server.bucket()
    return address


LABELS = ("Light", "Music", "Timer")
SAID = {
    "Light": ("turn on the light", "kitchen light off", "switch the lamp on", "make it bright", "turn off the lamp"),
    "Music": ("play music", "play the song", "stop the music", "play a song in the kitchen", "next song"),
    "Timer": ("set a timer", "ten minutes", "wake me in ten minutes", "start the timer", "stop the timer"),
}
MODEL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for phrases in SAID.values() for phrase in phrases for word in phrase.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*MODEL, *words])}, unk_token=MODEL[1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _make_base(folder: Path, seed: int = 1, tokenizer: Any = None, positions: int = 24, layers: int = 2) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    from edgeadapt.bases.base import find_base

    tokenizer = tokenizer or _tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
    )
    model, generator = BertModel(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the rest are ones and zeros
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return find_base(str(folder))


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Any]:
    """A function of a folder that makes a base there: two layers of BERT with seeded weights.

    It takes a seed, another tokenizer than that of ``SAID``, and how many tokens the base reads.
    """
    return _make_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _make_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny matrices a second thread only waits for the first, and for whatever else the machine does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _population(devices: int, unseen: int) -> Any:
    from simulations.data.population import Client, LabelledText, Population

    def phrases(number: int, count: int) -> tuple[LabelledText, ...]:
        """So many phrases, with a mix of intents that depends on the client."""
        labels = [(number * k + k // 3) % len(LABELS) for k in range(1, count + 1)]
        return tuple(LabelledText(SAID[LABELS[i]][(number + k) % 5], i, "t") for k, i in enumerate(labels))

    clients = tuple(
        Client(
            name=f"device-{number:02d}",
            language="en",
            unseen=number >= devices,
            train=phrases(number, 4 + number % 5),
            validation=phrases(number + 1, 30),
            test=phrases(number + 2, 4),
        )
        for number in range(devices + unseen)
    )
    public = tuple(LabelledText(SAID[label][0], i, "p") for i, label in enumerate(LABELS))
    return Population(LABELS, public, clients)


@dataclass
class TinyFleet:
    """A provisioned fleet in ``out``, with what a run of it needs."""

    out: Path
    scenario: Any
    population: Any
    base: Any
    nodes: dict[int, str] = field(default_factory=dict)  # node id → home

    def state_dir(self, device: str) -> Any:
        from client.node.statedir import DeviceStateDir
        from simulations.engine.provision import device_folder

        return DeviceStateDir.open(device_folder(self.out, device))

    def node(self, device: str) -> int:
        return next(node for node, state_dir in self.nodes.items() if Path(state_dir).name == device)

    def grid(self, *, app: Any = None, kind: type | None = None, **faults: Any) -> Any:
        """A grid over all devices, without faults except those that are given."""
        from simulations.engine.grid import FaultModel, InProcessGrid
        from tests.support.seededapp import app as client_app

        model = FaultModel(**{"seed": self.scenario.seed, "message_loss": 0.0, "mean_delay": 1.0, **faults})
        return (kind or InProcessGrid)(app or client_app, self.nodes, model)

    def federate(self, grid: Any) -> tuple[Any, ...]:
        """Run the rounds that are still to do, as a run does; the records of all rounds."""
        from flwr.app import Context, RecordDict

        from coordinator.app import STATE, app
        from coordinator.transport import RUN_ID, SERVER_NODE

        app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {STATE: str(self.out / "coordinator")}))
        return self.registry().rounds()  # type: ignore[no-any-return]

    def registry(self) -> Any:
        from simulations.engine import provision

        return provision.registry(self.out)

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Change the coordinator's settings, by dotted keys."""
        path = self.out / "coordinator" / "federation.toml"
        settings = tomllib.loads(path.read_text())
        for key, value in changes.items():
            *sections, last = key.split(".")
            section = settings
            for name in sections:
                section = section[name]
            section[last] = value
        path.write_text(tomli_w.dumps(settings))


@pytest.fixture
def app_fleet_of(tmp_path: Path, tiny_base: Any, one_thread: None) -> Callable[..., TinyFleet]:
    """Make a fleet of so many devices; keywords are keys of the federation, dots as double underscores."""
    from coordinator.transport import SERVER_NODE
    from simulations.engine import provision
    from simulations.scenario import Scenario

    count = 0

    def make(
        devices: int = 8, *, unseen: int = 1, seed: int = 0, adapter: Mapping[str, Any] | None = None, **federation: Any
    ) -> TinyFleet:
        nonlocal count
        count += 1
        settings = {"name": "tiny", "seed": seed, "base": {"model": str(tiny_base.folder)}}
        settings |= {"adapter": adapter or {"rank": 2}}
        scenario, population = Scenario.parse(settings, "tiny"), _population(devices, unseen)
        made = TinyFleet(tmp_path / f"fleet-{count}", scenario, population, tiny_base)
        provision.provision(made.out, scenario, population, tiny_base)
        provision.Enrolment.of(made.out, scenario, population, tiny_base).enrol(
            client.name for client in population.clients
        )
        made.configure({"rounds": 3, "training.learning_rate": 0.01})
        made.configure({key.replace("__", "."): value for key, value in federation.items()})
        seen = [household.name for household in population.clients if not household.unseen]
        folders = (str(provision.device_folder(made.out, name)) for name in seen)
        made.nodes = dict(enumerate(folders, SERVER_NODE + 1))
        return made

    return make


@pytest.fixture
def fleet_of(app_fleet_of: Callable[..., TinyFleet]) -> Callable[..., TinyFleet]:
    """``app_fleet_of``, except where a folder has a fleet without the apps under this name."""
    return app_fleet_of
