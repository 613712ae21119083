"""A federation of a node on Flower's grid, a light device, and tabs of Chromium, which are driven by their view."""

import contextlib
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Message

from adapters.evaluation import EvaluationTask
from adapters.gateway.invitation import Invitation
from adapters.rollout import Rollout
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from aggregation.pki.certificates import to_pem
from aggregation.pki.identity import PublicKey
from aggregation.pki.requests import read_request
from aggregation.steps import Step
from client.browser.server import Site, http_server
from client.inference.trust import Trust
from client.node.statedir import SETTINGS
from client.training.evaluate import own_counts
from client.training.examples import Split, in_split, read_examples
from client.updates.channel import UPDATES
from client.updates.rolloutnote import RolloutNote
from coordinator.app import run
from coordinator.authority import AuthorityStore
from coordinator.authority.store import CERTIFICATE, KEY, RECORD
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from coordinator.gateway.grid import GatewayGrid, JoinedGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.gateway.websocket import BrowserSettings
from coordinator.statedir import CoordinatorStateDir
from tests.browser.conftest import CONFIG
from tests.support import cdp
from tests.support.flowerlink import link_of, living
from tests.support.gateway import HOST, attending, authority_of, free_port, give_tls, server_tls, wait_until
from tests.support.hostile import audit_failures

SHOWN = "([...document.querySelectorAll('#participation form')].find((form) => !form.hidden)?.id ?? '')"
STATE = "document.getElementById('join-state').textContent"
AWAY = "This browser does not take part now."
OUTCOMES = "[...document.querySelectorAll('#rounds tr')].map((row) => row.dataset.outcome)"
CONDITIONS = {"minimum_cohort": 3, "minimum_survivors": 2, "answer-quantum": 0}
SPENT = (
    "[...document.querySelectorAll('#identity div')].find((each) => each.innerText.includes('Privacy'))"
    ".querySelector('dd').innerText"
)
NOISY = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 1.0}
KEPT = """(async () => {
  const { IDENTITIES, transact } = await import("/storage.js");
  const { parts } = (await transact(IDENTITIES, "readonly", (store) => store.getAll())).find((one) => one.parts);
  return [...parts.values.keys()].sort();
})()"""  # names of the tensors that a tab does not share
LIMITED = {"maximum_epsilon": 90, "minimum_noise_multiplier": 0.2}
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


@pytest.fixture
def tabs(chromium: Any) -> Iterator[list[cdp.Page]]:
    pages = [cdp.Page(chromium), cdp.Page(chromium)]
    yield pages
    for page in pages:
        page.close()


@contextlib.contextmanager
def served(bundle: Path, **addresses: str) -> Iterator[str]:
    """The URL of a page that may connect to a gateway, and to an enrolment service, while the block runs."""
    with http_server(Site.of(bundle, **addresses), HOST, 0) as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"http://{HOST}:{serving.server_port}/"
        finally:
            serving.shutdown()


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
    """Let a Python device answer and train with the bundle that the tabs have, at a share of one half."""
    note, content = bundle.parent / UPDATES, Trust.open(bundle).bundle.adapter_manifest("global").content
    note.mkdir(exist_ok=True)
    RolloutNote.write(note, RolloutNote(Rollout(2, 1, 50), {"global": (content, "0" * 64)}))
    file = folder / SETTINGS
    file.write_text(tomli_w.dumps(tomllib.loads(file.read_text()) | {"base": str(bundle)}))


def double_held_out(examples: Path) -> None:
    lines = examples.read_text().splitlines()
    examples.write_text("\n".join([*lines, *(line for line in lines if Split.VALIDATION.value in line)]) + "\n")


def right_answers(fleet: Any, names: Iterable[str], bundle: Path, content: str) -> tuple[float, float]:
    """Right answers and held-out examples of all these devices, counted in one place."""
    labels = fleet.population.labels
    task = EvaluationTask(CONFIG, labels, content, "0" * 64, 1, 2**16)
    held_out = [
        in_split(read_examples(fleet.state_dir(name).examples, len(labels)), Split.VALIDATION) for name in names
    ]
    right, count, *_ = np.sum([own_counts(bundle, task, each) for each in held_out], axis=0)
    return float(right), float(count)


@pytest.mark.slow
def test_a_node_of_flower_a_light_device_and_two_tabs_train_an_adapter_together(
    fleet_of: Callable[..., Any], phone: Path, libraries: None, tabs: list[cdp.Page], tmp_path: Path
) -> None:
    """Each trains on its own examples. One tab enrols with a request, the other one with a token. In the first run the
    heads stay on the devices, and updates have noise; the second run sums R of Fed-SB.

    In the third round, which is of a second session, one tab is closed after its device has shared its secrets. It is
    opened again, as is the other one, without the page's server, and both take part in the next run of the coordinator,
    which ends with an evaluation of the release in their bundle: without noise, the tabs count nothing.
    """
    fleet = fleet_of(4, rounds=3, aggregation__session_rounds=2, method="fedper", **NOISY)
    give_tls(fleet)
    folders = sorted(map(Path, fleet.nodes.values()))
    names = tuple(folder.name for folder in folders)
    for folder in folders[:2]:
        give_bundle(folder, phone)
    state_dir, link, port = CoordinatorStateDir.open(fleet.out / "coordinator"), link_of(1), free_port()
    enrolment = free_port()

    @contextlib.contextmanager
    def cohort(kind: type[GatewayGrid]) -> Iterator[tuple[Any, JoinedGrid]]:
        """The grids of a run, with the node and the light device on them."""
        place = f"{HOST}:0", server_tls(authority_of(fleet)), state_dir.read_root, GatewayLimits(grace=1.0)
        light = kind(*place, own_process=False, browsers=BrowserSettings(f"{HOST}:{port}"))
        with contextlib.closing(light), living(link, [str(folders[0])]), attending(light.port, folders[1:2]):
            yield light, JoinedGrid(link.grid, light)

    gateway, service = f"ws://{HOST}:{port}", f"ws://{HOST}:{enrolment}"
    with (
        served(phone, gateway=gateway) as url,
        served(phone, gateway=gateway, enrolment=service) as with_token,
        enrolling(tmp_path / "authority", authority_of(fleet), enrolment) as store,
    ):
        devices = [
            Tab(page, name, tmp_path / name, url)
            for page, name, url in zip(tabs, names[2:], (url, with_token), strict=True)
        ]
        with cohort(ClosingGrid) as (light, grid):
            light.tab = tabs[1]
            devices[0].enrol(fleet)
            devices[1].redeem(fleet, store)
            for device in devices:
                device.take_part(fleet.state_dir(device.name).examples, **LIMITED)
            grid.await_devices(4)
            records = list(run(state_dir, grid))
        assert [record.version for record in records] == [1, 2, 3]
        assert [record.survivors for record in records] == [names, names, names[:3]]
        assert records[2].dropped == {names[3]: "plan"}
        stays = devices[0]
        stays.page.until(f"{STATE} === {AWAY!r}")
        states = " ".join(stays.page.evaluate("states"))
        assert all(word in states for word in ("Waiting", "training, step 1 of", "masking", "The run is over"))
        assert stays.page.alert("join-error") == ""
        assert stays.page.evaluate(KEPT) == ["classifier.bias", "classifier.weight"]
        ledger = fleet.state_dir(names[0]).load_privacy_ledger()
        epsilon = f"{ledger.spent.epsilon(1e-6):.2f}"
        assert stays.page.evaluate(SPENT) == f"epsilon {epsilon} for delta 0.000001 by 3 contributions with noise"
    tabs[1].open()
    for name in names[:2]:
        double_held_out(fleet.state_dir(name).examples)
    release = Trust.open(phone).bundle.adapter_manifest("global").content
    compared = {"rounds": 1, "newest": release, "previous": "0" * 64, "most": 60}
    fleet.configure(
        {
            "rounds": 5,
            "method": "fedsb",
            "privacy.mechanism": "none",
            "privacy.noise_multiplier": 0.0,
            **{f"evaluation.{name}": value for name, value in compared.items()},
        }
    )
    with cohort(GatewayGrid) as (_, grid):
        for device in devices:
            device.page.goto(device.url)
            device.until_shown("join-form")
            shown = device.page.evaluate("document.getElementById('maximum_epsilon').value")
            assert shown == str(LIMITED["maximum_epsilon"])  # of the visit before
            device.take_part(fleet.state_dir(device.name).examples, maximum_epsilon=0)
        grid.await_devices(4)
        records = list(run(CoordinatorStateDir.open(fleet.out / "coordinator"), grid))
    assert [(each.version, each.survivors, each.dropped) for each in records] == [(4, names, {}), (5, names, {})]
    right, count = right_answers(fleet, names[:2], phone, release)
    assert count == 120  # fewer than 100 would not be published
    assert records[1].metrics == {"deviation": 0.0, "accuracy_newest": round(right / count, 2), "examples_newest": 64.0}
    for device, counted in zip(devices, (5, 4), strict=True):
        device.page.until(f"{STATE} === {AWAY!r}")
        assert device.page.evaluate(OUTCOMES) == ["counted"] * counted
    assert stays.page.evaluate(SPENT).endswith("by 3 contributions with noise; 2 without noise, which nothing bounds")
    stays.fill(**{"join-when": "open"})
    stays.click("join")
    stays.page.until("!document.getElementById('join-leave').disabled")
    stays.click("join-leave")
    stays.page.until("!document.getElementById('identity-forget').disabled")
    assert stays.page.evaluate(STATE) == AWAY
    stays.click("identity-forget")
    stays.until_shown("enrol-form")
    assert stays.page.errors() == []
    assert audit_failures(fleet.out) == set()
    state_dir.registry.close()
