"""Serves the page that runs a bundle in a browser, or exports it for another server.

The served files are a closed list: the page, its libraries, the pinned keys, and the files of one bundle. A
requested path is joined to a folder only if it is on this list.

The page verifies the bundle itself (``page/trust.js``). It trusts its server for its code and the pinned keys, but not
for the bundle."""

import functools
import gzip
import hashlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Self

from aggregation.errors import ConfigError, DataError
from client.inference.trust import Trust
from edgeadapt.formats.bundle import BASE_MANIFEST, TRUST, adapter_names
from edgeadapt.formats.storage import new_folder, real

WEB = Path(__file__).parent / "page"
LIBRARIES = WEB / "node_modules"
PAGE = ("*.html", "*.css", "*.js", "*.svg", "*.webmanifest", "*.LICENSE", "aggregation/*.js", "learning/*.js")
# A library's file on the page → in node_modules. The build (setup.py) reads the same file.
VENDOR: dict[str, str] = json.loads(Path(__file__).with_name("vendor.json").read_bytes())
PACKED = ".wasm.gz"  # of a library in a wheel, and on its way to a browser: a quarter of the bytes
BUNDLE_FILE = re.compile(r"bundle/(base|adapters)/[A-Za-z0-9_][A-Za-z0-9_.-]*")
LISTING = "bundle.json"
SITE = "site.json"  # path → SHA-256 of every other file: what the service worker keeps
ADDRESS = re.compile(r"wss://[A-Za-z0-9.-]+(:[0-9]{1,5})?|ws://(127\.0\.0\.1|localhost):[0-9]{1,5}")
LOCAL = ("127.0.0.1", "localhost")
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".pem": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
}
# Nothing from another origin; and cross-origin isolation, without which browsers give a page no threads.
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Site:
    """The files that are served, by path without the leading slash."""

    page: dict[str, Path]
    bundle: Path
    gateway: str = ""
    enrolment: str = ""

    @classmethod
    def of(cls, bundle: Path, trust: Path | None = None, gateway: str = "", enrolment: str = "") -> Self:
        """Serve the page with one bundle and the keys of ``trust``, by default ``trust.pem`` next to the bundle.

        ``gateway``: of a coordinator, to which the page may connect besides its own server: ``wss://HOST:PORT``, or
        ``ws://`` on loopback; empty: none. ``enrolment``: the same of the authority's enrolment service; with
        ``gateway`` only. Raises ConfigError: ``gateway`` or ``enrolment`` is not such an address, or the page or its
        libraries are not installed; DataError: there is no bundle; TrustError: there are no pinned keys, or they are in
        the bundle."""
        if not (bundle / BASE_MANIFEST).is_file():
            raise DataError(f"{bundle} is not a bundle: it has no base", about="bundle")
        Trust.open(bundle, trust)
        page = {path.relative_to(WEB).as_posix(): path for pattern in PAGE for path in WEB.glob(pattern)}
        page |= {name: _library(path) for name, path in VENDOR.items()}
        if any(not path.is_file() for path in page.values()):
            reason = f"the libraries of the page are not installed: run npm ci --ignore-scripts --prefix '{WEB}'"
            if not (WEB / "package-lock.json").is_file():
                reason = "edgeadapt was built without its page: run 'make wheel' in a checkout, and install dist/*.whl"
            raise ConfigError(reason, about="node_modules")
        page[TRUST] = trust or real(bundle).parent / TRUST
        for name, url in (("gateway", gateway), ("enrolment", enrolment)):
            if url and not ADDRESS.fullmatch(url):
                text = f"{url} is not an address to connect to: wss://HOST:PORT, or ws://127.0.0.1:PORT on this machine"
                raise ConfigError(text, about=f"--{name}")
        if enrolment and not gateway:
            raise ConfigError("--enrolment goes with --gateway, where the device takes part", about="--enrolment")
        return cls(page, real(bundle), gateway, enrolment)

    @property
    def headers(self) -> dict[str, str]:
        policy = "Content-Security-Policy"
        return {**HEADERS, policy: self._allowing(HEADERS[policy])}

    def find(self, path: str) -> Path | bytes | None:
        """Find the file or bytes at ``path``; None if it is not on the list."""
        if path == LISTING:
            return json.dumps({"adapters": adapter_names(self.bundle)}).encode()
        if path == SITE:
            return json.dumps({each: self._digest(each) for each in self.paths() if each != SITE}).encode()
        if BUNDLE_FILE.fullmatch(path):
            file = self.bundle / path.removeprefix("bundle/")
            # A symbolic link must not lead out of the bundle.
            return file if file.is_file() and file.resolve().is_relative_to(self.bundle) else None
        if self.gateway and path in ("", "index.html"):
            return self._allowing(self.page["index.html"].read_text(encoding="utf-8")).encode()
        return self.page.get(path or "index.html")

    def paths(self) -> list[str]:
        files = (file.relative_to(self.bundle).as_posix() for file in self.bundle.rglob("*"))
        listed = sorted(path for name in files if self.find(path := f"bundle/{name}") is not None)
        return [*self.page, LISTING, SITE, *listed]

    def _allowing(self, text: str) -> str:
        """Change the security policy in a text so that the page may also connect to the gateway and the authority."""
        own, addresses = "default-src 'self'", " ".join(filter(None, (self.gateway, self.enrolment)))
        return text.replace(own, f"{own}; connect-src 'self' {addresses}") if addresses else text

    def _digest(self, path: str) -> str:
        file = self.find(path)
        if isinstance(file, Path):
            status = file.stat()
            return _file_digest(file, status.st_mtime_ns, status.st_size)
        return hashlib.sha256(file or b"").hexdigest()

    def export(self, out: Path) -> None:
        """Write all files to ``out``, a folder that any server can serve. Raises ConfigError: ``out`` is not an empty
        folder, or cannot be written."""
        try:
            with new_folder(out) as stage:
                for path in self.paths():
                    _write(stage / path, self.find(path))
        except OSError as error:
            reason = f"cannot write {out} ({error.strerror}); name another folder"
            raise ConfigError(reason, about="--export") from error


def http_server(site: Site, host: str, port: int) -> ThreadingHTTPServer:
    """Listen at the address with a server that answers while ``serve_forever`` runs. Raises ConfigError: the address is
    empty, in use, or not of this machine."""
    if not host:  # Python would listen on every address of the machine
        raise ConfigError("--host is empty; name an address, or omit --host to serve this machine only", about="--host")
    handler = type("Handler", (_Handler,), {"site": site, "local": host in LOCAL})
    try:
        return _Server((host, port), handler)
    except OSError as error:
        reason = f"cannot serve at {host}:{port} ({error.strerror}); choose another --host or --port"
        raise ConfigError(reason, about="--port") from error


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that a browser closed while a file was sent."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    site: Site
    local: bool  # listens on this machine only
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edgeadapt", ""

    def do_GET(self) -> None:
        content = self.site.find(self.path.partition("?")[0].removeprefix("/")) if self._own_host() else None
        if content is None:
            self._head(HTTPStatus.NOT_FOUND, 0, {})
        elif isinstance(content, bytes):
            kind = TYPES[".json" if self.path.partition("?")[0].endswith(".json") else ".html"]
            self._head(HTTPStatus.OK, len(content), {"Content-Type": kind})
            if self.command != "HEAD":
                self.wfile.write(content)
        else:
            self._file(content)

    do_HEAD = do_GET  # noqa: N815  # the base class calls this name

    def log_message(self, *_: object) -> None:
        """Log nothing: requests show what a user does on the page."""

    def _own_host(self) -> bool:
        # DNS rebinding: a foreign site whose name resolves to this machine must not read the bundle.
        name = self.headers.get("Host", "").rsplit(":", 1)[0] if self.local else LOCAL[0]
        return name in LOCAL

    def _file(self, file: Path) -> None:
        packed = _is_packed(file)
        if packed and "gzip" not in self.headers.get("Accept-Encoding", ""):
            self._head(HTTPStatus.NOT_ACCEPTABLE, 0, {"Vary": "Accept-Encoding"})
            return
        with file.open("rb") as stream:
            status = file.stat()
            tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
            if self.headers.get("If-None-Match") == tag:
                self._head(HTTPStatus.NOT_MODIFIED, 0, {"ETag": tag})
                return
            kind = TYPES[".wasm"] if packed else TYPES.get(file.suffix, "application/octet-stream")
            coding = {"Content-Encoding": "gzip"} if packed else {}
            self._head(HTTPStatus.OK, status.st_size, {"ETag": tag, "Content-Type": kind} | coding)
            if self.command != "HEAD":
                shutil.copyfileobj(stream, self.wfile)

    def _head(self, status: HTTPStatus, length: int, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**self.site.headers, **more, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _library(path: str) -> Path:
    """Find a library's file: as it is, or as a wheel has it."""
    file = LIBRARIES / path
    packed = file.with_name(f"{file.name}.gz")
    return packed if _is_packed(packed) and packed.is_file() and not file.is_file() else file


def _is_packed(file: Path) -> bool:
    return file.name.endswith(PACKED) and file.is_relative_to(LIBRARIES)


def _opened(file: Path) -> BufferedIOBase:
    return gzip.open(file) if _is_packed(file) else file.open("rb")


@functools.lru_cache(maxsize=4096)
def _file_digest(path: Path, _time: int, _size: int) -> str:
    with _opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, found: Path | bytes | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(found, Path):
        with _opened(found) as read, path.open("wb") as write:
            shutil.copyfileobj(read, write)
    elif found is not None:
        path.write_bytes(found)
