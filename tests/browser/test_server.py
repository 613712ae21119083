"""The page's server serves the files on its list, to this machine, and nothing else. No browser is needed."""

import gzip
import http.client
import json
import posixpath
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

import client.browser.server
from aggregation.errors import ConfigError, DataError, TrustError
from client.browser.server import HEADERS, PAGE, VENDOR, WEB, Site, http_server
from client.cli import device
from edgeadapt.formats.files import sha256
from tests.support import refused

Get = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture(autouse=True)
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in place of those that npm installs."""
    folder = tmp_path / "node_modules"
    for path in VENDOR.values():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    monkeypatch.setattr(client.browser.server, "LIBRARIES", folder)
    return folder


@pytest.fixture
def get(bundle: Path) -> Iterator[Get]:
    """Requests a path exactly as it is written; a browser would normalize it."""
    with http_server(Site.of(bundle), "127.0.0.1", 0) as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

        def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=10)
            connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            found = (answer.status, dict(answer.getheaders()), answer.read())
            connection.close()
            return found

        yield ask
        serving.shutdown()


def test_the_page_its_libraries_the_bundle_and_the_keys_are_served(get: Get, bundle: Path) -> None:
    for path, file in (
        ("/", WEB / "index.html"),
        ("/worker.js", WEB / "worker.js"),
        ("/trust.pem", bundle.parent / "trust.pem"),
        ("/bundle/base/manifest.json", bundle / "base" / "manifest.json"),
        ("/bundle/adapters/global.onnx_adapter", bundle / "adapters" / "global.onnx_adapter"),
    ):
        assert get(path)[::2] == (200, file.read_bytes()), path
    for path, source in VENDOR.items():
        assert get(f"/{path}")[::2] == (200, source.encode())
    assert json.loads(get("/bundle.json")[2]) == {"adapters": ["global"]}


def test_every_answer_carries_the_headers_that_isolate_the_page(get: Get) -> None:
    for path in ("/", "/worker.js", "/bundle.json", "/bundle/base/manifest.json", "/nothing"):
        found = get(path)[1]
        assert HEADERS.items() <= found.items(), path
    assert "default-src 'self'" in HEADERS["Content-Security-Policy"]
    assert "unsafe-inline" not in HEADERS["Content-Security-Policy"]
    assert "http" not in HEADERS["Content-Security-Policy"]


OFF_THE_LIST = (
    "/../trust.seen.json /bundle/../trust.pem /bundle/base/../../trust.pem "
    "/bundle/base/..%2f..%2ftrust.pem /bundle/base/%2e%2e/manifest.json /bundle/base/..\\..\\trust.pem "
    "/bundle/adapters//global.json /bundle/base/manifest.json/ /bundle/base/ /bundle/base /bundle/ "
    "/bundle/base/.hidden /bundle/secrets/key.pem /bundle/key.pem /etc/passwd //etc/passwd "
    "/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs /package.json /vendor/ /vendor/../web.py "
    "/bundle/base/manifest.json%00.txt http://127.0.0.1/trust.seen.json"
)


def test_a_path_that_is_not_on_the_list_is_not_found(get: Get, bundle: Path) -> None:
    for secret in ("base/.hidden", "secrets/key.pem", "key.pem"):
        (bundle / secret).parent.mkdir(exist_ok=True)
        (bundle / secret).write_bytes(b"secret")
    (bundle.parent / "trust.seen.json").write_bytes(b"secret")
    for path in OFF_THE_LIST.split():
        assert get(path)[::2] == (404, b""), path


def test_a_link_that_leaves_the_bundle_is_not_followed(get: Get, bundle: Path) -> None:
    (bundle.parent / "private").write_bytes(b"secret")
    (bundle / "base" / "link").symlink_to(bundle.parent / "private")
    assert get("/bundle/base/link")[::2] == (404, b"")


def test_a_page_under_a_foreign_host_name_reads_nothing(get: Get) -> None:
    assert get("/bundle/base/manifest.json", Host="evil.example:80")[::2] == (404, b"")
    assert get("/bundle/base/manifest.json", Host="")[::2] == (404, b"")
    for name in ("localhost", "localhost:8765", "127.0.0.1:1"):
        assert get("/bundle/base/manifest.json", Host=name)[0] == 200


def test_nothing_can_be_written(get: Get) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert get("/trust.pem", method)[0] == 501


def test_a_file_is_sent_again_only_if_it_changed(get: Get, bundle: Path) -> None:
    tag = get("/bundle/base/manifest.json")[1]["ETag"]
    assert get("/bundle/base/manifest.json", If_None_Match=tag)[::2] == (304, b"")
    (bundle / "base" / "manifest.json").write_bytes(b"other")
    assert get("/bundle/base/manifest.json", If_None_Match=tag)[::2] == (200, b"other")


def test_a_library_of_a_wheel_is_sent_packed_and_the_copy_has_the_digest_of_what_it_was(
    bundle: Path, libraries: Path, request: pytest.FixtureRequest
) -> None:
    name, source = next((name, source) for name, source in VENDOR.items() if name.endswith(".wasm"))
    (libraries / source).unlink()
    (libraries / f"{source}.gz").write_bytes(gzip.compress(b"what it was"))
    (bundle / "base" / "own.wasm.gz").write_bytes(b"of the bundle, and sent as it is")
    get: Get = request.getfixturevalue("get")
    status, headers, body = get(f"/{name}", Accept_Encoding="gzip, br")
    assert (status, headers["Content-Type"], headers["Content-Encoding"]) == (200, "application/wasm", "gzip")
    assert gzip.decompress(body) == b"what it was"
    assert json.loads(get("/site.json")[2])[name] == sha256(b"what it was")
    assert get(f"/{name}")[::2] == (406, b"")
    status, headers, body = get("/bundle/base/own.wasm.gz", Accept_Encoding="gzip")
    assert (body, "Content-Encoding" in headers) == (b"of the bundle, and sent as it is", False)


def test_the_list_for_the_copy_has_the_digest_of_every_file_as_it_is_now(get: Get, bundle: Path) -> None:
    for _ in range(2):
        listed = json.loads(get("/site.json")[2])
        assert sorted([*listed, "site.json"]) == sorted(Site.of(bundle).paths())
        assert all(sha256(get(f"/{path}")[2]) == digest for path, digest in listed.items())
        (bundle / "base" / "manifest.json").write_bytes(b"other")


def test_a_head_request_gets_no_body(get: Get, bundle: Path) -> None:
    for path in ("/bundle.json", "/bundle/base/manifest.json"):
        status, headers, body = get(path, "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) == len(get(path)[2])


def test_a_page_that_is_closed_while_it_loads_leaves_no_message(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (bundle / "base" / "large").write_bytes(bytes(2**24))  # more than what lies between the two ends
    with http_server(Site.of(bundle), "127.0.0.1", 0) as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        for _ in range(2):
            with socket.create_connection(serving.server_address[:2]) as gone:
                gone.sendall(b"GET /bundle/base/large HTTP/1.1\r\nHost: localhost\r\n\r\n")
                gone.recv(1)
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        ended = time.monotonic() + 10
        while any("process_request" in thread.name for thread in threading.enumerate()) and time.monotonic() < ended:
            time.sleep(0.01)
        serving.shutdown()
    assert capfd.readouterr() == ("", "")


def test_missing_libraries_are_refused_with_the_command_that_installs_them(bundle: Path, libraries: Path) -> None:
    (libraries / "onnxruntime-web" / "dist" / "ort.wasm.min.mjs").unlink()
    with refused(ConfigError, "node_modules") as caught:
        Site.of(bundle)
    assert f"npm ci --ignore-scripts --prefix '{WEB}'" in str(caught.value)


def test_a_folder_without_a_bundle_and_keys_in_the_bundle_are_refused(bundle: Path, tmp_path: Path) -> None:
    with refused(DataError, "bundle", value=str(tmp_path)):
        Site.of(tmp_path)
    (bundle / "trust.pem").write_bytes((bundle.parent / "trust.pem").read_bytes())
    with pytest.raises(TrustError):
        Site.of(bundle, bundle / "trust.pem")


def test_keys_named_by_the_user_are_served_instead(bundle: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.pem"
    (bundle.parent / "trust.pem").rename(mine)
    assert Site.of(bundle, mine).find("trust.pem") == mine


def test_a_port_in_use_is_refused_in_one_line(bundle: Path) -> None:
    site = Site.of(bundle)
    with http_server(site, "127.0.0.1", 0) as first, refused(ConfigError, "--port", value=first.server_port) as caught:
        http_server(site, "127.0.0.1", first.server_port)
    assert "choose another --host or --port" in str(caught.value)


def test_an_empty_address_is_not_every_address(bundle: Path) -> None:
    with refused(ConfigError, "--host"):
        http_server(Site.of(bundle), "", 0)


def test_the_exported_site_is_what_would_be_served(bundle: Path, tmp_path: Path) -> None:
    (bundle / "base" / ".hidden").write_bytes(b"secret")
    out = tmp_path / "site"
    done = CliRunner().invoke(device, ["web", "--bundle", str(bundle), "--export", str(out)])
    assert done.exit_code == 0, done.output
    site = Site.of(bundle)
    written = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert sorted(written) == sorted(site.paths())
    assert "bundle/base/.hidden" not in written
    for path, raw in written.items():
        found = site.find(path)
        assert raw == (found.read_bytes() if isinstance(found, Path) else found)


def test_a_folder_that_is_not_empty_is_not_exported_to(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    out.mkdir()
    (out / "mine").write_bytes(b"mine")
    with pytest.raises(ConfigError):
        Site.of(bundle).export(out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    Site.of(bundle).export(out)
    assert (out / "index.html").is_file()


def test_a_page_may_connect_to_the_one_gateway_that_is_named_and_to_no_other_host(bundle: Path) -> None:
    policy = "Content-Security-Policy"
    plain, named = Site.of(bundle), Site.of(bundle, gateway="wss://fleet.example:9445")
    assert plain.headers == HEADERS
    assert named.headers[policy].count("connect-src 'self' wss://fleet.example:9445;") == 1
    page = named.find("index.html")
    assert isinstance(page, bytes)
    assert page.count(b"connect-src 'self' wss://fleet.example:9445;") == 1
    assert page.replace(b" connect-src 'self' wss://fleet.example:9445;", b"") == (WEB / "index.html").read_bytes()
    for wrong in ("ws://fleet.example:9445", "wss://a; script-src *", "wss://", "https://a", "wss://a/b", "wss://*"):
        with refused(ConfigError, "--gateway", value=wrong):
            Site.of(bundle, gateway=wrong)


def test_the_page_states_the_version_that_is_installed() -> None:
    found = (WEB / "aggregation" / "websocket.js").read_text(encoding="utf-8")
    assert f'const VERSION = "{version("edgeadapt")}";' in found


def test_every_file_that_the_page_asks_for_is_on_the_list(bundle: Path) -> None:
    """Otherwise a renamed module or a missing library would show only in a browser."""
    site = Site.of(bundle)
    for file in (file for pattern in PAGE if pattern.endswith(".js") for file in WEB.glob(pattern)):
        folder = file.parent.relative_to(WEB).as_posix()
        for line in file.read_text().splitlines():
            if " from " in line and (quoted := line.split(" from ")[-1].strip(' ;"')).startswith("."):
                assert site.find(posixpath.normpath(f"{folder}/{quoted}")) is not None, (file.name, quoted)
