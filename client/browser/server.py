"""Serves the page that runs a bundle in a browser, or writes it out for any other server.

Which files there are to be had is a closed list: the page, the four libraries it runs on, the pinned keys, and the
files of one bundle, by name. No path of a request is ever joined to a folder unless it is one of these.

What the page believes is its own matter (``page/trust.js``). It trusts its server for its code and the pinned
keys, never for the bundle.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from adapters.storage import new_folder
from aggregation.errors import ConfigError, DataError
from client.inference.trust import TRUST_FILE, Trust, adapter_names

WEB = Path(__file__).parent / "page"
LIBRARIES = WEB / "node_modules"
PAGE = ("*.html", "*.css", "*.js", "*.svg")
VENDOR = {  # where the page looks for a library's file → where npm puts it
    "vendor/jinja/LICENSE": "@huggingface/jinja/LICENSE",
    "vendor/jinja/index.js": "@huggingface/jinja/dist/index.js",
    "vendor/noble-ed25519/index.js": "@noble/ed25519/index.js",
    "vendor/noble-ed25519/LICENSE": "@noble/ed25519/LICENSE",
    "vendor/onnxruntime-web/ort-wasm-simd-threaded.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "vendor/onnxruntime-web/ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "vendor/onnxruntime-web/ort.wasm.min.mjs": "onnxruntime-web/dist/ort.wasm.min.mjs",
    "vendor/tokenizers/LICENSE": "@huggingface/tokenizers/LICENSE",
    "vendor/tokenizers/tokenizers.min.mjs": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
}
BUNDLE_FILE = re.compile(r"bundle/(base|adapters)/[A-Za-z0-9_][A-Za-z0-9_.-]*")
LISTING = "bundle.json"
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
}
# Nothing from another origin, and isolated from every other page: browsers give threads to isolated pages only.
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
    """What can be had, by the path of its address without the leading slash."""

    page: dict[str, Path]
    bundle: Path

    @classmethod
    def of(cls, bundle: Path, trust: Path | None = None) -> Self:
        """The page with one bundle and the keys of ``trust``, by default ``trust.pem`` beside the bundle.

        Raises:
            DataError: There is no bundle.
            TrustError: No pinned keys, or they lie in the bundle.
            ConfigError: The page's libraries are not installed.
        """
        if not (bundle / "base" / "card.json").is_file():
            raise DataError(f"there is no bundle at {bundle}")
        Trust.open(bundle, trust)
        page = {path.name: path for pattern in PAGE for path in WEB.glob(pattern)}
        page |= {name: LIBRARIES / path for name, path in VENDOR.items()}
        if any(not path.is_file() for path in page.values()):
            raise ConfigError(f"the page's libraries are not installed: npm ci --ignore-scripts --prefix '{WEB}'")
        page["trust.pem"] = trust or bundle.resolve().parent / TRUST_FILE
        return cls(page, bundle.resolve())

    def find(self, path: str) -> Path | bytes | None:
        """The file or the bytes at ``path``; None for whatever is not on the list."""
        if path == LISTING:
            return json.dumps({"adapters": adapter_names(self.bundle)}).encode()
        if BUNDLE_FILE.fullmatch(path):
            file = self.bundle / path.removeprefix("bundle/")
            # A link that leaves the bundle is not the bundle's.
            return file if file.is_file() and file.resolve().is_relative_to(self.bundle) else None
        return self.page.get(path or "index.html")

    def paths(self) -> list[str]:
        """Every path that ``find`` finds, but for the empty one."""
        files = (file.relative_to(self.bundle).as_posix() for file in self.bundle.rglob("*"))
        return [*self.page, LISTING, *(path for name in files if self.find(path := f"bundle/{name}") is not None)]

    def export(self, out: Path) -> None:
        """Write everything to ``out``, a folder that any server can serve as it is.

        Raises:
            ConfigError: ``out`` exists and is not an empty folder, or cannot be written.
        """
        try:
            with new_folder(out) as stage:
                for path in self.paths():
                    _write(stage / path, self.find(path))
        except OSError as error:
            raise ConfigError(f"cannot write {out} ({error.strerror}); name another folder") from error


def server(site: Site, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is bound, and answers once ``serve_forever`` runs.

    Raises:
        ConfigError: The address cannot be had.
    """
    if not host:  # would be every address of the machine
        raise ConfigError("an empty --host is no address to serve at; name one, or leave it out for this machine only")
    handler = type("Handler", (_Handler,), {"site": site, "local": host in LOCAL})
    try:
        return _Server((host, port), handler)
    except OSError as error:
        reason = f"cannot serve at {host}:{port} ({error.strerror})"
        raise ConfigError(f"{reason}; choose another --host or --port") from error


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a page that was closed while it was loading; the next one is served all the same."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    site: Site
    local: bool  # served to this machine only
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edgeadapt", ""

    def do_GET(self) -> None:
        """Answer with a file, "not changed since", or "not found"."""
        found = self.site.find(self.path.partition("?")[0].removeprefix("/")) if self._addressed() else None
        if found is None:
            self._head(HTTPStatus.NOT_FOUND, 0, {})
        elif isinstance(found, bytes):
            self._head(HTTPStatus.OK, len(found), {"Content-Type": TYPES[".json"]})
            self._body(found)
        else:
            self._file(found)

    do_HEAD = do_GET  # noqa: N815  # the base class looks for this name

    def log_message(self, *_: object) -> None:
        """Say nothing: what a user does on the page is nobody's matter."""

    def _addressed(self) -> bool:
        # A foreign page whose name was pointed at this machine must not read the bundle (DNS rebinding).
        name = self.headers.get("Host", "").rsplit(":", 1)[0] if self.local else LOCAL[0]
        return name in LOCAL

    def _file(self, file: Path) -> None:
        with file.open("rb") as stream:
            status = file.stat()
            tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
            if self.headers.get("If-None-Match") == tag:
                self._head(HTTPStatus.NOT_MODIFIED, 0, {"ETag": tag})
                return
            kind = TYPES.get(file.suffix, "application/octet-stream")
            self._head(HTTPStatus.OK, status.st_size, {"ETag": tag, "Content-Type": kind})
            if self.command != "HEAD":
                shutil.copyfileobj(stream, self.wfile)

    def _body(self, blob: bytes) -> None:
        if self.command != "HEAD":
            self.wfile.write(blob)

    def _head(self, status: HTTPStatus, length: int, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **more, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _write(path: Path, found: Path | bytes | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(found, Path):
        shutil.copyfile(found, path)
    elif found is not None:
        path.write_bytes(found)
