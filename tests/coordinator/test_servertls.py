"""The gateway's TLS key is renewed by the commands while it serves: nobody is disconnected, and no bad file counts."""

import asyncio
import logging
import ssl
import stat
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPSConnection
from pathlib import Path
from threading import Thread

import pytest
from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Authority
from aggregation.pki.certificates import serial, to_der
from coordinator import servertls
from coordinator.cli import coordinator_group as coordinator
from coordinator.dashboard.server import DashboardServer, serve
from coordinator.gateway.carriers import BrowserSettings, Conversations, SocketCalls
from coordinator.gateway.grid import serving
from coordinator.servertls import ServerTls, TlsFiles, context
from coordinator.settings import FederationSettings
from coordinator.statedir import TLS_REQUEST, CoordinatorStateDir
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats import keyfiles
from edgeadapt.formats.keyfiles import NEXT_TLS_KEY, TLS_CERTIFICATE, TLS_KEY
from tests.support import refused
from tests.support.authority import signer, store
from tests.support.gateway import HOST, certify, free_port, wait_until
from tests.support.lightdevice import LightDevice
from tests.support.trial import call

__all__ = ["signer", "store"]


@pytest.fixture
def state_dir(store: AuthorityStore, tmp_path: Path) -> CoordinatorStateDir:
    """Of a coordinator with a certified TLS key."""
    settings, pinned = FederationSettings(), store.root.to_pem()
    made = CoordinatorStateDir.create(tmp_path / "fleet", pinned, settings, SystemEntropy())
    renew(made, store)
    return made


def request(state_dir: CoordinatorStateDir) -> None:
    done = CliRunner().invoke(coordinator, ["tls-request", str(state_dir.folder)])
    assert done.exception is None, done.exception


def certified(state_dir: CoordinatorStateDir, store: AuthorityStore, host: str = HOST) -> bytes:
    """The certificate for the newest request, PEM."""
    out = store.folder / "issued.pem"
    given = ("--request", state_dir.folder / TLS_REQUEST, "--host", host, "--out", out)
    call("authority", "issue", store.folder, *given)
    return out.read_bytes()


def copy(state_dir: CoordinatorStateDir, content: bytes) -> None:
    """As ``cp`` does, which replaces no file as a whole."""
    with (state_dir.folder / TLS_CERTIFICATE).open("wb") as file:
        file.write(content)


def renew(state_dir: CoordinatorStateDir, store: AuthorityStore) -> bytes:
    request(state_dir)
    found = certified(state_dir, store)
    copy(state_dir, found)
    return found


def presented(port: int) -> int:
    """The serial number of the certificate that a connection gets which begins now."""
    return serial(to_der(ssl.get_server_certificate((HOST, port), timeout=60).encode()))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "edgeadapt.coordinator"]
    assert not any("\n" in text for text in found)
    return found


def test_a_gateway_that_serves_takes_the_new_key_and_disconnects_nobody(
    state_dir: CoordinatorStateDir,
    store: AuthorityStore,
    signer: Authority,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(servertls, "LOOK", 0.0)
    old = (state_dir.folder / TLS_CERTIFICATE).read_bytes()
    with (
        caplog.at_level(logging.INFO, "edgeadapt.coordinator"),
        state_dir.locked(),
        serving(state_dir, f"{HOST}:0", own_process=False) as grid,
    ):
        kitchen = LightDevice(grid.gateway, signer, "kitchen")
        stream = kitchen.attend()
        request(state_dir)
        assert presented(grid.gateway.port) == serial(to_der(old))
        new = certified(state_dir, store)
        _, other = certify(signer)
        for useless in (b"", new[: len(new) // 2], other, b"\xff" * 2**18):
            copy(state_dir, useless)
            assert presented(grid.gateway.port) == serial(to_der(old))
        assert len(lines(caplog)) == 3  # an empty one and a half one are one problem
        assert all("not used" in each for each in lines(caplog))
        copy(state_dir, new)
        assert presented(grid.gateway.port) == serial(to_der(new))
        garage = LightDevice(grid.gateway, signer, "garage")
        streams = {"kitchen": stream, "garage": garage.attend()}
        grid.gateway.ask({name: ("offer", {"body": b"body"}) for name in streams}, 60.0)
        for each in streams.values():
            assert each.request().step == "offer"
        for device in (kitchen, garage):
            device.close()
    assert len(lines(caplog)) == 4
    assert not (state_dir.folder / NEXT_TLS_KEY).exists()
    assert stat.S_IMODE((state_dir.folder / TLS_KEY).stat().st_mode) == 0o600


def test_a_server_of_asyncio_takes_the_new_key_and_its_hosts(
    state_dir: CoordinatorStateDir, store: AuthorityStore
) -> None:
    """As the WebSocket and the dashboard do; this client asks for no name."""
    pairs = [ServerTls(*state_dir.read_tls(datetime.now(UTC)))]

    class Source:
        def newest(self) -> ServerTls:
            return pairs[-1]

    async def seen() -> list[int]:
        server = await asyncio.start_server(lambda _, writer: writer.close(), HOST, 0, ssl=context(Source()))
        port, found = server.sockets[0].getsockname()[1], list[int]()
        found.append(await asyncio.to_thread(presented, port))
        renew(state_dir, store)
        pairs.append(ServerTls(*state_dir.read_tls(datetime.now(UTC))))
        found.append(await asyncio.to_thread(presented, port))
        server.close()
        return found

    assert asyncio.run(seen()) == [serial(to_der(each.certificate)) for each in pairs]
    pages = SocketCalls(Conversations({}, Source()), BrowserSettings("0.0.0.0:0"))
    assert pages._names == {HOST}
    pairs.append(ServerTls(pairs[-1].key, certified(state_dir, store, "Fleet.Example")))
    assert pages._names == {"fleet.example"}


def test_the_dashboard_answers_for_the_hosts_of_the_new_certificate(
    state_dir: CoordinatorStateDir, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servertls, "LOOK", 0.0)
    port, made, begin = free_port(), list[DashboardServer](), DashboardServer.__init__
    monkeypatch.setattr(DashboardServer, "__init__", lambda self, *given: made.append(self) or begin(self, *given))
    serving = Thread(target=serve, args=(dict, "t" * 40, f"{HOST}:{port}", TlsFiles(state_dir)), daemon=True)
    serving.start()
    wait_until(lambda: made and made[0].started, 120.0)

    def statuses() -> list[int]:
        found = []
        for host in (HOST, "fleet.example"):
            connection = HTTPSConnection(HOST, port, context=ssl._create_unverified_context(), timeout=60)  # noqa: S323
            connection.request("GET", "/health", headers={"Host": f"{host}:{port}"})
            found.append(connection.getresponse().status)
            connection.close()
        return found

    assert statuses() == [200, 421]
    request(state_dir)
    copy(state_dir, certified(state_dir, store, "Fleet.Example"))
    assert statuses() == [421, 200]
    made[0].should_exit = True
    serving.join(120)


def test_the_key_in_use_stays_until_the_certificate_of_the_next_one_is_there(
    state_dir: CoordinatorStateDir, store: AuthorityStore
) -> None:
    now, pair = datetime.now(UTC), state_dir.read_tls(datetime.now(UTC))
    request(state_dir)
    request(state_dir)  # the next one is replaced, and not the one in use
    assert state_dir.read_tls(now) == pair
    copy(state_dir, certified(state_dir, store))
    following = (state_dir.folder / NEXT_TLS_KEY).read_bytes()
    request(state_dir)  # before anything has looked: the certified key is kept
    assert state_dir.read_tls(now)[0] == following == (state_dir.folder / TLS_KEY).read_bytes()
    assert (state_dir.folder / NEXT_TLS_KEY).exists()
    (state_dir.folder / NEXT_TLS_KEY).write_bytes(b"")
    assert state_dir.read_tls(now)[0] == following
    (state_dir.folder / TLS_KEY).write_bytes(pair[0])
    with refused(TrustError, "key.pem"):
        state_dir.read_tls(now)
    (state_dir.folder / NEXT_TLS_KEY).unlink()
    with refused(TrustError, TLS_KEY) as caught:
        state_dir.read_tls(now)
    assert TLS_REQUEST in str(caught.value)
    (state_dir.folder / TLS_KEY).unlink()
    with refused(ConfigError, TLS_KEY):
        state_dir.read_tls(now)


def test_a_key_that_cannot_be_renamed_is_used_and_never_replaced(
    state_dir: CoordinatorStateDir, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where the old key is mounted as a file."""
    renew(state_dir, store)
    following, genuine = (state_dir.folder / NEXT_TLS_KEY).read_bytes(), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if Path(target).name == TLS_KEY:
            raise OSError(16, "Device or resource busy")
        return genuine(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    for _ in range(2):
        assert state_dir.read_tls(datetime.now(UTC))[0] == following
    asked = (state_dir.folder / TLS_REQUEST).read_bytes()
    for old in (None, b""):
        if old is not None:
            (state_dir.folder / TLS_KEY).write_bytes(old)
        done = CliRunner().invoke(coordinator, ["tls-request", str(state_dir.folder)])
        assert isinstance(done.exception, ConfigError)
        assert f"{NEXT_TLS_KEY}: put it in the place of {TLS_KEY} first" in str(done.exception)
        assert state_dir.read_tls(datetime.now(UTC))[0] == following
        assert (state_dir.folder / TLS_REQUEST).read_bytes() == asked
    (state_dir.folder / TLS_KEY).write_bytes(following)
    request(state_dir)
    assert state_dir.read_tls(datetime.now(UTC))[0] == following
    copy(state_dir, certified(state_dir, store))
    assert state_dir.read_tls(datetime.now(UTC))[0] == (state_dir.folder / NEXT_TLS_KEY).read_bytes() != following


def test_a_request_while_the_certified_key_is_renamed_loses_no_key(
    state_dir: CoordinatorStateDir, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew(state_dir, store)
    following, genuine, met = (state_dir.folder / NEXT_TLS_KEY).read_bytes(), Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if self.name == NEXT_TLS_KEY and not met:
            met.append(target)
            with suppress(TimeoutError):  # it has to wait until the key is renamed
                state_dir.request_tls("gateway", SystemEntropy())
        return genuine(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(keyfiles, "PATIENCE", 0.0, raising=False)
    for _ in range(2):
        assert state_dir.read_tls(datetime.now(UTC))[0] == following
    assert met


def test_two_that_read_at_once_find_the_key(
    state_dir: CoordinatorStateDir, store: AuthorityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has looked at the old key, and not at the next one, when the other renames that."""
    renew(state_dir, store)
    following, genuine, met = (state_dir.folder / NEXT_TLS_KEY).read_bytes(), keyfiles.read, []

    def read(path: Path, limit: int) -> bytes:
        found = genuine(path, limit)
        if path.name == TLS_KEY and not met:
            met.append(path)
            state_dir.read_tls(datetime.now(UTC))
        return found

    monkeypatch.setattr(keyfiles, "read", read)
    assert state_dir.read_tls(datetime.now(UTC))[0] == following
    assert not (state_dir.folder / NEXT_TLS_KEY).exists()
