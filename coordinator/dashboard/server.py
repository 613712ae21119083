"""The dashboard as a web application: a page behind a login, its live data, and metrics.

The token in ``dashboard.token`` opens it: a person logs in with it, Prometheus sends it as a bearer token. Nothing can
be changed here. On a loopback address it is served without TLS, on any other with the coordinator's TLS certificate.

A connection holds one of few places until a request on it has the token or a session (``coordinator.gateway.places``).
Until then each serves one request. The right token is accepted at once, unless somebody of the same network has just
sent a wrong one: texts of a network are compared one at a time, and each wrong one takes ``PATIENCE`` seconds."""

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from coordinator.dashboard.view import exposition
from coordinator.gateway.carriers import LOOPBACK
from coordinator.gateway.places import Entrance, Turns
from coordinator.servertls import TlsSource, context
from coordinator.settings import is_loopback
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import MAX_PEM

TOKEN = "dashboard.token"  # noqa: S105  # in the coordinator's state directory
COOKIE = "edgeadapt-session"
PAGE = Path(__file__).parent / "page"
FILES = {"style.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}  # without a login
EVERY = 1.0  # seconds between two polls of the fleet, however many pages are open
KEEP_ALIVE = 15.0  # seconds between two lines of a stream in which nothing happens
LOGIN_SECONDS = 12 * 3600.0
MAX_LOGINS = 64
MAX_FORM = 4096  # bytes
PATIENCE = 1.0  # seconds that a wrong token costs its network; one at a time
STOPPING = 5  # seconds for open streams to end; they look once a second
MAX_STREAMS = 32
HEADERS = (
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; "
        b"base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),  # a form of this page keeps its origin
    (b"x-content-type-options", b"nosniff"),
)
CLOSE = b"connection", b"close"
Look = Callable[[], dict[str, Any]]


def read_token(folder: Path, entropy: Entropy) -> str:
    """Read the token of a state directory, which the first call makes. Raises TrustError: the file does not have a
    token of at least 128 bits."""
    path = folder / TOKEN
    try:
        token = storage.read(path, MAX_PEM).decode(errors="replace").strip()
    except FileNotFoundError:
        token = entropy.bytes(32).hex()
        storage.replace(path, token.encode() + b"\n")
    if not re.fullmatch(r"[A-Za-z0-9._~-]{32,512}", token):
        raise TrustError(f"{path} has no token: delete it, and a new one is made", about=TOKEN)
    return token


@dataclass(slots=True)
class Logins:
    """Sessions that the token opened. ``entrance``: where requests come from; None in a process."""

    token: str = field(repr=False)
    entrance: Entrance | None = None
    _sessions: dict[str, float] = field(default_factory=dict, repr=False)  # random value of a cookie → until when
    _turns: Turns = field(default_factory=Turns)

    async def allows(self, request: Request) -> bool:
        """Whether a request comes from a session, or has the token; a wrong token is refused after a while."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        allowed = await self._is_token(request, token.strip()) if scheme.lower() == "bearer" else self.is_open(request)
        if allowed and self.entrance and request.client:
            self.entrance.prove(request.client)
        return allowed

    def is_open(self, request: Request) -> bool:
        return self._sessions.get(request.cookies.get(COOKIE, ""), 0.0) > time.monotonic()

    async def open(self, request: Request, given: str) -> str | None:
        """Open a session if the text is the token; None, after a while, for another text."""
        if not await self._is_token(request, given):
            return None
        now = time.monotonic()
        alive = {each: end for each, end in self._sessions.items() if end > now}
        self._sessions = dict(list(alive.items())[-MAX_LOGINS + 1 :])
        session = secrets.token_urlsafe(32)
        self._sessions[session] = now + LOGIN_SECONDS
        return session

    def close(self, request: Request) -> None:
        self._sessions.pop(request.cookies.get(COOKIE, ""), None)

    async def _is_token(self, request: Request, given: str) -> bool:
        """Compare a text with the token, in its turn. A client that has hung up before that has guessed nothing."""
        async with self._turns.held(request.client.host if request.client else ""):
            if await request.is_disconnected():
                return False
            if secrets.compare_digest(given.encode(), self.token.encode()):
                return True
            await asyncio.sleep(PATIENCE)
            return False


@dataclass(slots=True)
class Feed:
    """The fleet as JSON, read at most once a second."""

    look: Look
    view: dict[str, Any] = field(default_factory=dict)
    streams: int = 0
    over: bool = False  # the streams end
    _at: float = float("-inf")
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def now(self) -> dict[str, Any]:
        """The view, or ``{"error": …}`` while it cannot be read."""
        async with self._one:
            if time.monotonic() - self._at >= EVERY:
                try:
                    self.view = await asyncio.to_thread(self.look)
                except (EdgeAdaptError, OSError) as error:
                    self.view = {"error": str(error)}
                self._at = time.monotonic()
            return self.view

    async def events(self, allowed: Callable[[], bool]) -> AsyncIterator[str]:
        """Yield server-sent events, one for each change, as long as the reader is allowed to have them."""
        self.streams += 1
        last, quiet = None, 0.0
        try:
            while allowed() and not self.over:
                if (now := json.dumps(await self.now())) != last:
                    last, quiet = now, 0.0
                    yield f"data: {now}\n\n"
                elif quiet >= KEEP_ALIVE:
                    quiet = 0.0
                    yield ": nothing new\n\n"
                await asyncio.sleep(EVERY)
                quiet += EVERY
        finally:
            self.streams -= 1


class Guard:
    """Refuse requests for another host, and add ``HEADERS`` to every response; one to a stranger is the last."""

    def __init__(self, app: ASGIApp, hosts: Callable[[], Collection[str]], entrance: Entrance | None) -> None:
        self._app, self._hosts, self._entrance = app, hosts, entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                stranger = self._entrance and not self._entrance.is_proved(scope["client"])
                message["headers"] = [*message["headers"], *HEADERS, *([CLOSE] if stranger else [])]
            await send(message)

        if scope["type"] == "http" and _host(Headers(scope=scope)) not in self._hosts():
            await Response("another host\n", HTTPStatus.MISDIRECTED_REQUEST)(scope, receive, sent)
        else:
            await self._app(scope, receive, sent)


def _host(headers: Headers) -> str | None:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Pages:
    logins: Logins
    feed: Feed
    secure: bool  # whether it is served over TLS

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html") if await self.logins.allows(request) else _to_login()

    async def log_in(self, request: Request) -> Response:
        if request.method != "POST":
            return _login()
        session = await self.logins.open(request, await _given_token(request))
        if session is None:
            return _login(refused=True)
        answer = RedirectResponse("/", HTTPStatus.SEE_OTHER)
        answer.set_cookie(COOKIE, session, int(LOGIN_SECONDS), **self._cookie)
        return answer

    async def log_out(self, request: Request) -> Response:
        self.logins.close(request)
        answer = _to_login()
        answer.delete_cookie(COOKIE, **self._cookie)
        return answer

    @property
    def _cookie(self) -> Any:
        return {"httponly": True, "samesite": "strict", "secure": self.secure}

    def guarded(self, serve: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Serve those only who have the token or a session."""

        async def guard(request: Request) -> Response:
            if not await self.logins.allows(request):
                return Response("log in\n", HTTPStatus.UNAUTHORIZED, {"www-authenticate": "Bearer"})
            return await serve(request)

        return guard

    async def view(self, _: Request) -> Response:
        fleet = await self.feed.now()
        return JSONResponse(fleet, HTTPStatus.SERVICE_UNAVAILABLE if "error" in fleet else HTTPStatus.OK)

    async def events(self, request: Request) -> Response:
        if self.feed.streams >= MAX_STREAMS:
            return Response("too many pages are open\n", HTTPStatus.SERVICE_UNAVAILABLE)
        has_session = self.logins.is_open(request)
        allowed = lambda: self.logins.is_open(request) or not has_session  # noqa: E731
        return StreamingResponse(self.feed.events(allowed), media_type="text/event-stream")

    async def metrics(self, _: Request) -> Response:
        fleet = await self.feed.now()
        if "error" in fleet:
            return Response(fleet["error"] + "\n", HTTPStatus.SERVICE_UNAVAILABLE)
        return Response(exposition(fleet), media_type=CONTENT_TYPE_LATEST)


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in FILES:
        return Response(status_code=HTTPStatus.NOT_FOUND)
    return FileResponse(PAGE / name, media_type=FILES[name])


async def _health(_: Request) -> Response:
    return Response("ok\n")


def application(
    look: Look, token: str, hosts: Callable[[], Collection[str]], *, secure: bool, entrance: Entrance | None = None
) -> Starlette:
    """Make the web application. ``look``: reads the fleet's view; called from a thread, never twice at once. ``hosts``:
    names by which it may be called now: a foreign site whose name resolves to this machine is refused. ``entrance``:
    where it listens; None if it is called within a process."""
    pages = Pages(Logins(token, entrance), Feed(look), secure)
    routes = [
        Route("/", pages.page),
        Route("/files/{name}", _static),
        Route("/login", pages.log_in, methods=["GET", "POST"]),
        Route("/logout", pages.log_out, methods=["POST"]),
        Route("/view.json", pages.guarded(pages.view)),
        Route("/events", pages.guarded(pages.events)),
        Route("/metrics", pages.guarded(pages.metrics)),
        Route("/health", _health),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(Guard, hosts=hosts, entrance=entrance)])
    app.state.feed = pages.feed
    return app


def _login(*, refused: bool = False) -> Response:
    text = (PAGE / "login.html").read_text(encoding="utf-8")
    if refused:
        text = text.replace("<!-- refused -->", '<p role="alert" class="alert">This is not the token.</p>')
    return HTMLResponse(text, HTTPStatus.UNAUTHORIZED if refused else HTTPStatus.OK)


def _to_login() -> Response:
    return RedirectResponse("/login", HTTPStatus.SEE_OTHER)


async def _given_token(request: Request) -> str:
    """Read the token of a login form; empty if it has none, or is too large."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM:
            return ""
    return parse_qs(body.decode("ascii", "replace")).get("token", [""])[0].strip()


def serve(look: Look, token: str, address: str, tls: TlsSource | None) -> None:
    """Serve at ``address`` (``HOST:PORT``) until SIGINT or SIGTERM; ``look`` and ``token`` are as for ``application``.
    Raises ConfigError: there is no TLS and the address is not a loopback one, or nothing can listen there."""
    host, _, port = address.rpartition(":")
    if tls is None and not is_loopback(address):
        text = f"{host} can be reached from other machines, so it needs TLS: make DIR/tls.pem, or listen at 127.0.0.1"
        raise ConfigError(text, about="--listen")
    with _listening(host.strip("[]"), int(port)) as entrance:
        hosts = lambda: tls.newest().hosts if tls else LOOPBACK  # noqa: E731
        app = application(look, token, hosts, secure=tls is not None, entrance=entrance)
        config = uvicorn.Config(
            app,
            loop="asyncio",  # uvloop accepts connections itself, past the places of the entrance
            http="h11",  # the other parser has no limit on headers
            ws="none",
            proxy_headers=False,  # who is on this machine could claim any address
            log_config=None,  # logging is the process's: dictConfig would close the handlers of everything else in it
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOPPING,
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=2**14,
        )
        config.load()
        config.ssl = None if tls is None else context(tls)
        DashboardServer(config, app.state.feed).run([entrance])


class DashboardServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the streams, which uvicorn would otherwise cancel with an error."""
        self._feed.over = True
        super().handle_exit(sig, frame)


def _listening(host: str, port: int) -> Entrance:
    try:
        return Entrance.listening(host, port)
    except OSError as error:
        text = f"nothing can listen at {host}:{port} ({error.strerror or error}); choose another address"
        raise ConfigError(text, about="--listen") from error
