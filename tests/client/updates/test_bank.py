"""A device keeps a part of a channel's adapters, within its bytes, and fetches others when they are asked for."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

import edgeadapt
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError
from client.inference.bank import RETRY
from client.inference.library import Library
from client.inference.server import Service
from client.inference.session import AUTO, ClassificationSession
from client.inference.trust import Trust
from client.updates import ChannelSource, follow, update
from edgeadapt.formats.bundle import adapter_names, adapter_path, manifest_path
from edgeadapt.formats.release import RELEASE
from edgeadapt.program import cli
from edgeadapt.releases.repository import ChannelRepository
from export.bundle.write import AdapterSource, add_adapter, write_bundle
from export.onnx.exported import ExportedBase
from tests.client.updates.conftest import NOW, Place
from tests.support import refused
from tests.support.bundles import flip, stated

PHRASES = ["turn on the kitchen lights", "lock the door", "play music"]
RANKS = {"a": 4, "b": 3, "c": 2, "d": 1}  # of the adapters, which give them different sizes


def ranked(given: AdapterSource, rank: int) -> AdapterSource:
    def cut(name: str, value: Any) -> Any:
        return value[:rank] if "lora_A" in name else value[:, :rank] if "lora_B" in name else value

    return replace(given, tensors={name: cut(name, value) for name, value in given.tensors.items()})


class Bank:
    """A channel with the adapters of ``RANKS``, ``global``, and a router that names "a", "global" and "b" for
    ``PHRASES``; and a device that keeps as many bytes as ``router``, ``global`` and the adapters ``keeps`` have."""

    def __init__(self, place: Place) -> None:
        self.place, self.bundle = place, place.bundle
        self.sources = [ranked(place.source(name, rank + 3, 1), rank) for name, rank in RANKS.items()]
        self.release(*self.sources)
        meaning = ClassificationSession.open(place.made, self.trust).embed(PHRASES)
        rows = (meaning - meaning.mean(axis=0)) * np.float32(1000)
        given = place.source("router", 1, 1)
        head = {"weight": rows, "bias": np.zeros(3, np.float32)}
        head = {name: head.get(name.rpartition("classifier.")[2], 0 * value) for name, value in given.tensors.items()}
        self.router = replace(given, tensors=head, labels=("a", "global", "b"))
        self.release(*self.sources, self.router)

    @property
    def trust(self) -> Path:
        return self.place.device / "trust.pem"

    def release(self, *sources: AdapterSource, exported: ExportedBase | None = None) -> None:
        shutil.rmtree(self.place.made, ignore_errors=True)
        given = [self.place.source("global", 0, 1), *sources]
        write_bundle(self.place.made, exported or self.place.exported, given, key=self.place.vendor)
        self.place.repository.publish("stable", self.place.made, [self.place.vendor.public])

    def size(self, *names: str, where: Path | None = None) -> int:
        paths = [path for name in names for path in (manifest_path(name), adapter_path(name))]
        return sum(((where or self.place.made) / path).stat().st_size for path in paths)

    def keep(self, *names: str, more: int = 0) -> int:
        limit = self.size("global", "router", *names) + more
        (self.place.folder / "root.json").write_bytes(self.place.repository.root())
        follow(self.bundle, ChannelSource(self.place.address, "stable", limit), self.place.folder / "root.json")
        assert self.place.update().changed
        return limit

    def names(self) -> set[str]:
        return set(adapter_names(self.bundle)) - {"global", "router"}

    def open(self, by: Callable[..., object] = update) -> ClassificationSession:
        return ClassificationSession.of(Library.open(self.bundle, None, update=by))

    def target(self, name: str) -> Path:
        (path,) = self.place.repository.targets.folder.rglob(f"*.{name}.onnx_adapter")
        return path


@pytest.fixture
def bank(place: Place) -> Bank:
    return Bank(place)


def later(session: ClassificationSession) -> None:
    """Let the time pass after which a fetch is tried again."""
    failed = session.library.bank._failed
    failed.expire(failed.timer() + RETRY + 1)


# --- what works


def test_the_adapters_stay_within_the_bytes_and_those_used_last_stay(bank: Bank) -> None:
    limit = bank.keep("b", "d")  # or "c", "d", and nothing larger
    assert bank.names() == set()
    for name, kept in [("a", "a"), ("d", "d"), ("b", "bd"), ("c", "cd"), ("d", "cd"), ("b", "bd"), ("global", "bd")]:
        assert bank.open().load(name).name == name
        assert bank.names() == set(kept)
        assert bank.size(*adapter_names(bank.bundle), where=bank.bundle) <= limit
    (bank.bundle / RELEASE).write_bytes(b"{")
    assert bank.place.update().changed
    assert bank.names() == {"b", "d"}
    assert not bank.place.update().changed


def test_an_adapter_in_memory_answers_while_others_take_its_place(bank: Bank) -> None:
    bank.keep("a")
    session = bank.open()
    first = session.load("a")
    session.load("b")
    assert bank.names() == {"b"}
    shutil.move(bank.place.folder / "releases" / "public", bank.place.folder / "away")
    assert session.load("a") is first
    with refused(ConfigError, "repository"):
        bank.open().load("a")


def test_a_private_adapter_stays_and_counts_not(bank: Bank, household: Any, exported: ExportedBase) -> None:
    bank.keep("a")
    add_adapter(bank.bundle, exported.adapter_inputs, bank.place.source("anna", 7, parent="a" * 64), key=household)
    session = bank.open()
    for name in ("a", "b"):
        session.load(name)
    assert bank.names() == {"anna", "b"}


def test_the_router_answers_with_the_default_while_its_choice_is_fetched(bank: Bank) -> None:
    bank.keep("a", "b")
    begun, may, asked = Event(), Event(), []

    def slow(*given: Any, wanted: str, **named: Any) -> object:
        asked.append(wanted)
        begun.set()
        assert may.wait(60)
        return update(*given, wanted=wanted, **named)

    session = bank.open(slow)
    assert session.answer(PHRASES[0], AUTO, 1)[0].name == "global"
    assert begun.wait(60)
    assert session.answer(PHRASES[0], AUTO, 1)[0].name == "global"
    assert session.answer(PHRASES[2], AUTO, 1)[0].name == "global"  # one at a time
    may.set()
    session.library.bank.wait()
    assert asked == ["a"]
    assert session.answer(PHRASES[0], AUTO, 1)[0].name == "a"


def test_each_way_to_ask_fetches(bank: Bank) -> None:
    bank.keep("a", "b", "c", "d")
    words = ["device", "infer", "--bundle", str(bank.bundle), "--adapter"]
    for adapter in (AUTO, "b"):
        found = CliRunner().invoke(cli, [*words, adapter, PHRASES[0]])
        assert found.exit_code == 0, found.output
    assert bank.names() == {"a", "b"}
    assert edgeadapt.load(bank.bundle, adapter="c").adapter == "c"
    service = Service(Library.open(bank.bundle, None, update=update), None, 1, 2**28)
    with TestClient(service.application(["*"])) as client:
        assert "d" in [one["id"] for one in client.get("/v1/models").json()["data"]]
        assert client.post("/v1/classify", json={"model": "d", "input": PHRASES[0]}).json()["data"][0]["adapter"] == "d"
        assert client.post("/v1/classify", json={"model": "e", "input": PHRASES[0]}).status_code == 404
    assert bank.names() == {"a", "b", "c", "d"}


def test_the_commands_say_how_much_is_kept(bank: Bank) -> None:
    words = ["device", "update", "--bundle", str(bank.bundle), "--keep-adapters", "1"]
    assert CliRunner().invoke(cli, words).exit_code == 2
    (bank.place.folder / "root.json").write_bytes(bank.place.repository.root())
    words += ["--repository", bank.place.address, "--channel", "stable", "--root", str(bank.place.folder / "root.json")]
    found = CliRunner().invoke(cli, words)
    assert (found.exit_code, bank.names()) == (0, set()), found.output
    assert json.loads((bank.place.device / "updates/source.json").read_bytes())["keep"] == 2**20
    bank.place.follow()
    assert bank.place.update().changed
    assert bank.names() == RANKS.keys()
    assert not (bank.bundle / RELEASE).exists()


# --- what is refused, and bad luck


def test_an_altered_adapter_is_refused_and_the_default_answers(bank: Bank) -> None:
    bank.keep("a", "b")
    good, session = bank.target("a").read_bytes(), bank.open()
    flip(bank.target("a"), 0.5)
    with refused(TrustError, "repository.file"):
        session.load("a")
    bank.target("a").write_bytes(good)
    with refused(TrustError, "repository.file"):  # it is not asked again at once
        session.load("a")
    assert session.answer(PHRASES[0], AUTO, 1)[0].name == "global"
    assert session.load("b").name == "b"
    later(session)
    assert session.load("a").name == "a"


def test_offline_the_default_answers_and_one_line_says_so(bank: Bank, caplog: pytest.LogCaptureFixture) -> None:
    bank.keep("a", "b")
    public, session = bank.place.folder / "releases" / "public", bank.open()
    public.rename(bank.place.folder / "away")
    for phrase in PHRASES:
        assert session.answer(phrase, AUTO, 1)[0].name == "global"
        session.library.bank.wait()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "edgeadapt.device"]
    assert said.startswith("adapter a is not here yet: ")
    service = Service(Library.open(bank.bundle, None, update=update), None, 1, 2**28)
    with TestClient(service.application(["*"])) as client:
        asked = [client.post("/v1/classify", json={"model": name, "input": PHRASES[0]}) for name in ("c", "global")]
    assert [one.status_code for one in asked] == [503, 200]
    assert "\n" not in said
    (bank.place.folder / "away").rename(public)
    later(session)
    session.answer(PHRASES[2], AUTO, 1)
    session.library.bank.wait()
    assert bank.names() == {"b"}


def test_a_server_brings_nothing_from_a_channel_that_was_not_renewed(bank: Bank) -> None:
    bank.keep("a", "b")
    ChannelRepository(bank.place.repository.folder, NOW - timedelta(days=8)).renew()
    service = Service(Library.open(bank.bundle, None, update=update), None, 1, 2**28)
    with TestClient(service.application(["*"])) as client:
        late, held = (
            client.post("/v1/classify", json={"model": name, "input": PHRASES[0]}) for name in ("c", "global")
        )
    assert [late.status_code, held.status_code] == [503, 200]
    assert "has not been renewed" in late.json()["error"]["message"]


@pytest.mark.parametrize("name", ["nobody", "x" * 64])
def test_an_adapter_that_the_release_does_not_have(bank: Bank, name: str) -> None:
    bank.keep("a")
    with refused(DataError, f"{name}.json", name):
        bank.open().load(name)


def test_an_adapter_above_the_bytes_is_named_with_the_remedy(bank: Bank) -> None:
    with refused(ConfigError, "--keep-adapters", "router"):
        bank.keep(more=-1)
    bank.keep("d")
    with refused(ConfigError, "--keep-adapters", "a"):
        bank.open().load("a")
    assert bank.open().load("global").name == "global"


def test_an_adapter_that_was_withdrawn_is_not_used_after_the_update(bank: Bank) -> None:
    bank.keep("a", "b")
    session = bank.open()
    for name in ("a", "b"):
        session.load(name)
    bank.release(*bank.sources[1:], bank.router)
    assert bank.place.update().changed
    with refused(DataError, "a.json"):
        session.load("a")
    assert "a" not in bank.names()
    assert session.load("b").name == "b"


def test_another_base_is_not_brought_by_a_name(bank: Bank, exported_int8: ExportedBase) -> None:
    bank.keep("a")
    session = bank.open()
    bank.release(*bank.sources, bank.router, exported=exported_int8)
    with refused(ConfigError, "base", "edgeadapt device update"):
        session.load("a")
    assert session.load("global").name == "global"


def test_an_adapter_older_than_the_device_has_seen_is_refused(bank: Bank) -> None:
    """The rules of every bundle hold for an adapter that is fetched alone."""
    bank.keep("a", "b")
    trust = Trust.open(bank.bundle)
    newer = replace(stated(bank.place.made, "a"), version=9)
    trust.seen.accept(newer)
    with refused(TrustError, "adapter-manifest.version"):
        bank.open().load("a")
    assert bank.names() == set()


@pytest.mark.parametrize("at", ["fetched", "replaced"])
def test_a_kill_leaves_a_bundle_that_opens(bank: Bank, at: str) -> None:
    bank.keep("a")
    replaced = "storage._exchange = lambda stage, out: (out.rename(storage._previous(out)), os.kill(os.getpid(), 9))"
    what = {"fetched": "channel._install = lambda *given: os.kill(os.getpid(), 9)", "replaced": replaced}[at]
    code = (
        "import os, sys; from pathlib import Path; from client.inference.library import *;"
        "from client.updates import channel; from edgeadapt.formats import storage;"
        f"{what}; Library.open(sys.argv[1], None, update=channel.update).load(Composition.parse('a'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bank.bundle)], check=False)
    assert done.returncode == -signal.SIGKILL
    session = bank.open()
    assert bank.names() == set()
    assert session.load("global").name == "global"
    assert session.load("a").name == "a"


def test_an_adapter_that_is_deleted_while_it_is_read_is_fetched_again(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.keep("a")
    read, seen = Trust.adapter, list[str]()

    def adapter(self: Trust, name: str, base: Any) -> Any:
        seen.append(name)
        if len(seen) == 1:
            update(bank.bundle, wanted="b", entropy=SystemEntropy())
        return read(self, name, base)

    monkeypatch.setattr(Trust, "adapter", adapter)
    assert bank.open().load("a").name == "a"
    assert seen == ["a", "a"]
