"""A federation of a node on Flower's grid, a light device, and tabs of Chromium, which are driven by their view."""

import contextlib
import threading
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import Message

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from aggregation.pki.certificates import to_pem
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.requests import read_request
from aggregation.steps import Step
from client.browser.server import Site, http_server
from client.inference.trust import Trust
from client.node.privacyledger import PrivacyLedger
from client.node.statedir import SETTINGS
from client.training.examples import Split, in_split, read_examples
from coordinator.app import run
from coordinator.gateway.carriers import BrowserSettings
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from coordinator.gateway.grid import GatewayGrid, JoinedGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.authority import AuthorityStore
from edgeadapt.authority.store import CERTIFICATE, KEY, RECORD
from edgeadapt.formats.gateway.invitation import Invitation
from export.bundle.sources import from_registry
from export.bundle.write import create
from export.onnx.exported import ExportedBase
from tests.support import FleetOf, cdp
from tests.support.flowerlink import Link, link_of, living
from tests.support.gateway import HOST, attending, authority_of, free_port, server_tls, wait_until
from tests.support.hostile import audit_failures

# Devices in tabs of Chromium, which are driven by their view as a person does.
SHOWN = "([...document.querySelectorAll('#participation form')].find((form) => !form.hidden)?.id ?? '')"
STATE = "document.getElementById('join-state').textContent"
AWAY = "This browser does not take part now."
OUTCOMES = "[...document.querySelectorAll('#rounds tr')].map((row) => row.dataset.outcome)"
CONDITIONS = {"minimum_cohort": 3, "minimum_survivors": 2, "answer-quantum": 0}
OBSERVE = """(() => {
  globalThis.states = [];
  const shown = document.getElementById("join-state");
  new MutationObserver(() => states.push(shown.textContent)).observe(shown, { childList: true });
})()"""


@dataclass
class Tab:
    """A device in a tab, driven as a person does."""

    page: cdp.Page
    name: str
    folder: Path  # where the browser puts what it saves
    url: str  # of its page

    def click(self, name: str) -> None:
        self.page.evaluate(f"document.getElementById({name!r}).click()")

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            self.page.evaluate(f"document.getElementById({name!r}).value = {str(value)!r}")

    def until_shown(self, form: str) -> None:
        self.page.until(f"{SHOWN} === {form!r} || document.getElementById('join-error').textContent")
        assert self.page.alert("join-error") == ""

    def refused(self, button: str) -> str:
        """The line that is shown after a click."""
        self.click(button)
        self.page.until("document.getElementById('join-error').textContent")
        return self.page.alert("join-error")

    def file(self, name: str, content: bytes) -> Path:
        self.folder.mkdir(exist_ok=True)
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def certified(self, authority: Authority, name: str, key: PublicKey) -> Path:
        begin = datetime.now(UTC) - timedelta(hours=1)
        der = authority.issue(name, key, not_before=begin, not_after=authority.root.not_after)
        return self.file(f"{name}.pem", to_pem(der))

    def redeem(self, fleet: Any, store: AuthorityStore) -> None:
        """Enrol with a token, which works once."""
        self.page.goto(self.url)
        self.until_shown("token-form")
        anchors = store.root.der, fleet.state_dir(self.name).coordinator.raw
        invitation = Invitation(SystemEntropy().bytes(16), self.name, f"{HOST}:1", f"{HOST}:2", *anchors)
        store.invite(self.name, invitation.key.public, 1.0)
        self.fill(token=invitation.to_text())
        self.click("redeem")
        self.until_shown("join-form")

    def enrol(self, fleet: Any) -> None:
        """Make a key that never leaves the tab, and have it certified; a wrong file is refused, and nothing is lost."""
        authority, coordinator = authority_of(fleet), fleet.state_dir(self.name).coordinator
        pins = self.file("authority.pem", authority.root.to_pem()), self.file("coordinator.pem", coordinator.to_pem())
        self.page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.folder))
        self.page.goto(self.url)
        self.until_shown("enrol-form")
        self.fill(**{"device-name": self.name})
        self.page.pick("#authority-file", pins[1])
        self.page.pick("#coordinator-file", pins[1])
        assert "not one certificate" in self.refused("enrol")
        self.page.pick("#authority-file", pins[0])
        self.click("enrol")
        self.until_shown("certificate-form")
        request = self.folder / f"{self.name}.csr"
        wait_until(request.exists)
        name, key = read_request(request.read_bytes())
        assert name == self.name
        self.page.pick("#certificate-file", self.certified(authority, "another", key))
        assert "another key or name" in self.refused("certificate-install")
        self.page.goto(self.url)  # the key is kept
        self.until_shown("certificate-form")
        self.page.pick("#certificate-file", self.certified(authority, self.name, key))
        self.click("certificate-install")
        self.until_shown("join-form")
        assert coordinator.key_id in self.page.alert("identity")

    def take_part(self, examples: Path, **conditions: float) -> None:
        """Take part with these examples, once there are as many as the conditions demand."""
        self.page.evaluate(OBSERVE)
        self.page.pick("#examples-file", examples)
        self.fill(**CONDITIONS, **conditions, **{"minimum-examples": 1000})
        assert "your minimum is 1000" in self.refused("join")
        self.fill(**{"minimum-examples": 1})
        self.click("join")


@contextlib.contextmanager
def served(bundle: Path, **addresses: str) -> Iterator[str]:
    """The URL of a page that may connect to a gateway, and to an enrolment service, while the block runs."""
    with http_server(Site.of(bundle, **addresses), HOST, 0) as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"http://{HOST}:{serving.server_port}/"
        finally:
            serving.shutdown()


SPENT = (
    "[...document.querySelectorAll('#identity div')].find((each) => each.innerText.includes('Privacy'))"
    ".querySelector('dd').innerText"
)
NOISY = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 1.0}
KEPT = """(async () => {
  const done = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const database = await done(indexedDB.open("edgeadapt"));
  const records = await done(database.transaction("identities").objectStore("identities").getAll());
  database.close();
  const { parts } = records.find((one) => one.parts);
  return [[...parts.values.keys()].sort(), parts.ever];
})()"""  # names of the tensors that a tab does not share, and the parts that it never will
LIMITED = {"maximum_epsilon": 90, "minimum_noise_multiplier": 0.2}


class ClosingGrid(GatewayGrid):
    """Closes a tab when the plans of the third round are about to be sent."""

    tab: cdp.Page
    plans = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        self.plans += batch[0].metadata.message_type == Step.PLAN.message_type
        if self.plans == 3 and batch[0].metadata.message_type == Step.PLAN.message_type:
            self.tab.shut()
        return super().push_messages(batch)


@contextlib.contextmanager
def enrolling(folder: Path, authority: Authority, port: int) -> Iterator[AuthorityStore]:
    """An authority with a record of its own, whose service listens for pages while the block runs."""
    folder.mkdir()
    for name, content in ((KEY, authority.key.to_pem(None)), (CERTIFICATE, authority.root.to_pem()), (RECORD, b"")):
        (folder / name).write_bytes(content)
    store = AuthorityStore(folder)
    store.sign_list(authority, 30)
    service = EnrolmentService(store, authority, 30)
    with contextlib.closing(EnrolmentServer(service, f"{HOST}:0", [HOST], BrowserSettings(f"{HOST}:{port}"))):
        yield store


def give_bundle(folder: Path, bundle: Path) -> None:
    """Let a Python device answer and train with the bundle that the tabs have."""
    file = folder / SETTINGS
    file.write_text(tomli_w.dumps(tomllib.loads(file.read_text()) | {"base": str(bundle)}))


def double_held_out(examples: Path) -> None:
    lines = examples.read_text().splitlines()
    examples.write_text("\n".join([*lines, *(line for line in lines if Split.VALIDATION.value in line)]) + "\n")


def held_out(fleet: Any, names: Iterable[str]) -> int:
    """How many held-out examples all these devices have."""
    files = (read_examples(fleet.state_dir(name).examples, len(fleet.population.labels)) for name in names)
    return sum(len(in_split(each, Split.VALIDATION)) for each in files)


@dataclass
class MixedFleet:
    """A fleet of a node on Flower's grid, a light device, and two tabs, in the order of their names."""

    fleet: Any
    bundle: Path
    port: int = field(default_factory=free_port)  # of the gateway, for tabs
    link: Link = field(default_factory=lambda: link_of(1))

    @property
    def folders(self) -> list[Path]:
        return sorted(map(Path, self.fleet.nodes.values()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(folder.name for folder in self.folders)

    def examples(self, name: str) -> Path:
        found: Path = self.fleet.state_dir(name).examples
        return found

    @contextlib.contextmanager
    def cohort(self, kind: type[GatewayGrid]) -> Iterator[tuple[Any, JoinedGrid]]:
        """The grids of a run, with the node and the light device on them; tabs may come."""
        authority, state_dir = authority_of(self.fleet), CoordinatorStateDir.open(self.fleet.out / "coordinator")
        place = f"{HOST}:0", server_tls(authority), state_dir.read_root, GatewayLimits(grace=1.0)
        light = kind(*place, own_process=False, browsers=BrowserSettings(f"{HOST}:{self.port}"))
        node, device = self.folders[:2]
        with (
            contextlib.closing(state_dir.registry),
            contextlib.closing(light),
            living(self.link, [str(node)]),
            attending(light.gateway.port, [device]),
        ):
            yield light, JoinedGrid(self.link.grid, light)

    def run(self, grid: JoinedGrid) -> list[Any]:
        """The records of the rounds that are still to do, which begin when all four are there."""
        grid.await_devices(4)
        state_dir = CoordinatorStateDir.open(self.fleet.out / "coordinator")
        with contextlib.closing(state_dir.registry):
            return list(run(state_dir, grid))


@pytest.mark.slow
def test_a_node_of_flower_a_light_device_and_two_tabs_train_an_adapter_together(
    fleet_of: FleetOf,
    trainable: ExportedBase,
    vendor: IdentityKey,
    libraries: None,
    tabs: list[cdp.Page],
    tmp_path: Path,
) -> None:
    """Each trains on its own examples. One tab enrols with a request, the other one with a token. The first run sums R
    of Fed-SB, and updates have noise; in the second run the heads stay on the devices.

    In the third round, which is of a second session, one tab is closed after its device has shared its secrets. It is
    opened again, as is the other one, without the page's server, and both take part in the next run of the coordinator,
    which ends with an evaluation of the release in their bundle, in which all four count.
    """
    fleet = fleet_of(4, rounds=3, aggregation__session_rounds=2, method="fedsb", **NOISY)
    phone = tmp_path / "bundle"
    create(phone, trainable, from_registry(fleet.out / "coordinator", 0, None), name="global", form="fp32", key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    mixed = MixedFleet(fleet, phone)
    for folder in mixed.folders[:2]:
        give_bundle(folder, phone)
    stays, closed = enrol_and_train_with_noise(mixed, tabs, tmp_path)
    shown_and_spent(stays, mixed)
    closed.page.open()
    keep_heads_and_evaluate(mixed, [stays, closed])
    leave_and_forget(stays)
    assert audit_failures(fleet.out) == set()


def enrol_and_train_with_noise(mixed: MixedFleet, tabs: list[cdp.Page], tmp_path: Path) -> list[Tab]:
    """The first run, while the page's server runs; the second tab is closed in the third round."""
    fleet, names, enrolment = mixed.fleet, mixed.names, free_port()
    gateway, service = f"ws://{HOST}:{mixed.port}", f"ws://{HOST}:{enrolment}"
    with (
        served(mixed.bundle, gateway=gateway) as url,
        served(mixed.bundle, gateway=gateway, enrolment=service) as with_token,
        enrolling(tmp_path / "authority", authority_of(fleet), enrolment) as store,
        mixed.cohort(ClosingGrid) as (light, grid),
    ):
        devices = [
            Tab(page, name, tmp_path / name, url)
            for page, name, url in zip(tabs, names[2:], (url, with_token), strict=True)
        ]
        light.tab = tabs[1]
        devices[0].enrol(fleet)
        devices[1].redeem(fleet, store)
        for device in devices:
            device.take_part(mixed.examples(device.name), **LIMITED)
        records = mixed.run(grid)
    assert [record.version for record in records] == [1, 2, 3]
    assert [record.survivors for record in records] == [names, names, names[:3]]
    assert records[2].dropped == {names[3]: "plan"}
    return devices


def shown_and_spent(tab: Tab, mixed: MixedFleet) -> None:
    """The tab says what it did, and accounts for what it revealed as a native device does."""
    tab.page.until(f"{STATE} === {AWAY!r}")
    states = " ".join(tab.page.evaluate("states"))
    assert all(word in states for word in ("Waiting", "training, step 1 of", "masking", "The run is over"))
    assert tab.page.alert("join-error") == ""
    ledger = mixed.fleet.state_dir(mixed.names[0]).load(PrivacyLedger)
    epsilon = f"{ledger.spent.epsilon(1e-6):.2f}"
    assert tab.page.evaluate(SPENT) == f"epsilon {epsilon} for delta 0.000001 by 3 contributions with noise"


def keep_heads_and_evaluate(mixed: MixedFleet, devices: list[Tab]) -> None:
    """The second run, of a round of FedPer and an evaluation, without the page's server."""
    fleet, names = mixed.fleet, mixed.names
    for name in names[:2]:
        double_held_out(mixed.examples(name))
    release = Trust.open(mixed.bundle).bundle.adapter_manifest("global").content
    compared = {"rounds": 1, "newest": release, "previous": "0" * 64, "most": 60}
    evaluation = {f"evaluation.{name}": value for name, value in compared.items()}
    silent = {"privacy.mechanism": "none", "privacy.noise_multiplier": 0.0}
    fleet.configure({"rounds": 5, "method": "fedper"} | silent | evaluation)
    with mixed.cohort(GatewayGrid) as (_, grid):
        for device in devices:
            device.page.goto(device.url)
            device.until_shown("join-form")
            shown = device.page.evaluate("document.getElementById('maximum_epsilon').value")
            assert shown == str(LIMITED["maximum_epsilon"])  # of the visit before
            device.take_part(mixed.examples(device.name), maximum_epsilon=0)
        records = mixed.run(grid)
    assert [(each.version, each.survivors, each.dropped) for each in records] == [(4, names, {}), (5, names, {})]
    metrics = records[1].metrics
    assert metrics["deviation"] > 60 * 2**0.5  # all that one device can count
    # Below 100 examples nothing is published.
    assert abs(metrics.get("examples_newest", 100.0) - held_out(fleet, names)) < 5 * metrics["deviation"]
    for device, counted in zip(devices, (5, 4), strict=True):
        device.page.until(f"{STATE} === {AWAY!r}")
        assert device.page.evaluate(OUTCOMES) == ["counted"] * counted
        assert device.page.evaluate(KEPT) == [["classifier.bias", "classifier.weight"], ["head"]]
    spent = devices[0].page.evaluate(SPENT)
    assert spent.endswith("by 4 contributions with noise; 1 without noise, which nothing bounds")


def leave_and_forget(tab: Tab) -> None:
    """Take part while the tab is open, end that, and forget the identity."""
    tab.fill(**{"join-when": "open"})
    tab.click("join")
    tab.page.until("!document.getElementById('join-leave').disabled")
    tab.click("join-leave")
    tab.page.until("!document.getElementById('identity-forget').disabled")
    assert tab.page.evaluate(STATE) == AWAY
    tab.click("identity-forget")
    tab.until_shown("enrol-form")
    assert tab.page.errors() == []
