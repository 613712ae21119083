"""Serves the adapters of a bundle to many tenants by HTTP, in the form of OpenAI's interface: a model is an adapter.

The model does one thing at a time. Texts to classify that wait while it runs are its next run, and answers are written
together, token by token (``batch.py``), whatever their adapters. Tenants are served in turn, however much one of them
asks. A tenant sees the adapters that match its patterns; any other does not exist for it. Nothing that is logged or
counted has a text.
``client.cli.serve`` decides where this listens.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import logging
import math
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import anyio
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BeforeValidator, FailFast, Field, model_validator
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from client.inference.batch import ROWS, BatchGenerator, Part, Row
from client.inference.connections import IDLE, PATIENCE, Connection, error_body
from client.inference.generate import ChatMessage
from client.inference.guide import Guide, GuideKind
from client.inference.library import Composition, Library
from client.inference.session import AUTO, ROUTER, ClassificationSession, Ranking, words_to_json
from client.inference.text import Answer, Finish, SamplingParams
from edgeadapt.bases.classifiergraph import MAX_ROWS
from edgeadapt.formats.settings import Settings

BASE = "base"  # the model without an adapter: of embeddings, and of a language model
MAX_BODY = 2**20  # bytes
MAX_UNREAD = 2**26  # bytes of a larger body, until its connection is closed
MAX_TEXTS, MAX_MESSAGES = 256, 1024  # of one request
MAX_STOPS = 16  # each is sought in each piece of an answer
MAX_WAITING = 2048  # texts and answers, of all tenants
MAX_CONNECTIONS = 1024
ONE_MODEL = "/v1/models/{model}"
REREAD = 1.0  # seconds until the file of tenants is looked at again
log = logging.getLogger("edgeadapt.device")
LOADED = 2**14  # adapters in memory: it is their bytes that are limited
END = object()
FINISHES = {Finish.LENGTH: "length", Finish.BLOCKED: "content_filter"}  # any other is stop
SENT = ("text", "prompt", "message", "guide")  # begin what a DataError is about that is the caller's
T = TypeVar("T")


class TenantSettings(Settings):
    """A table ``[tenants.NAME]``."""

    token_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    adapters: tuple[str, ...]
    requests_per_minute: Annotated[int, Field(ge=1)] = 600
    waiting: Annotated[int, Field(ge=1)] = 64
    metrics: bool = False


class Tenants(Settings):
    longest: ClassVar[int] = 2**22
    tenants: Annotated[dict[str, TenantSettings], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_tokens(self) -> "Tenants":
        if len({one.token_sha256 for one in self.tenants.values()}) < len(self.tenants):
            raise ValueError("two tenants have the same token_sha256; give each a token of its own")
        return self


def _nullable(default: Any) -> BeforeValidator:
    """Take ``default`` for null, which clients send for what was not given."""
    return BeforeValidator(lambda given: default if given is None else given)


def _no_tools(given: Any) -> None:
    if given not in (None, [], "none"):
        raise ValueError("this server calls no tools; leave it out, and ask for a form by response_format")


def _joined(content: Any) -> Any:
    """Make one text of the parts of a message."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise ValueError("a part is not of the type text, and this model reads no other")
    texts = [part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else texts


Model = Annotated[str, Field(max_length=256)]
# FailFast: else half a million wrong items are as many errors, of 600 MB.
Strings = Annotated[list[str], FailFast(), BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
NoTools = Annotated[None, BeforeValidator(_no_tools)]
Neutral = Annotated[float, Field(ge=0, le=0), _nullable(0.0)]  # of what this server does not weigh


class TextsRequest(Settings):
    model: Model
    input: Annotated[Strings, Field(min_length=1, max_length=MAX_TEXTS)]
    top: Annotated[int, Field(ge=1, le=1000)] = 1
    words: bool = False  # what is asked is each word of the texts
    encoding_format: Literal["float", "base64"] = "float"
    user: Annotated[str, _nullable("")] = ""  # not used: who asks is the tenant


class _Message(Settings):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]


class _Form(Settings):
    type: Literal["json_schema", "text"]
    json_schema: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it

    @property
    def guide(self) -> Guide | None:
        if self.type == "text":
            return None
        return Guide(GuideKind.JSON_SCHEMA, json.dumps(self.json_schema.get("schema")))


class _StreamOptions(Settings):
    include_usage: Annotated[bool, _nullable(False)] = False
    include_obfuscation: Literal[False] = False


class WrittenRequest(Settings):
    model: Model
    prompt: str = ""
    messages: Annotated[tuple[_Message, ...], FailFast(), Field(max_length=MAX_MESSAGES)] = ()
    max_tokens: Annotated[int, _nullable(256)] = 256
    max_completion_tokens: int | None = None  # the later name of ``max_tokens``
    temperature: Annotated[float, _nullable(0.0)] = 0.0
    top_p: Annotated[float, _nullable(1.0)] = 1.0
    seed: int | None = None
    stop: Annotated[Strings, Field(max_length=MAX_STOPS), _nullable([])] = []  # noqa: RUF012
    response_format: _Form | None = None
    stream: Annotated[bool, _nullable(False)] = False
    stream_options: _StreamOptions | None = None
    n: Annotated[Literal[1], _nullable(1)] = 1
    frequency_penalty: Neutral = 0.0
    presence_penalty: Neutral = 0.0
    logprobs: Annotated[Literal[False], _nullable(False)] = False
    store: Annotated[Literal[False], _nullable(False)] = False
    user: Annotated[str, _nullable("")] = ""
    tools: NoTools = None
    tool_choice: NoTools = None
    functions: NoTools = None
    function_call: NoTools = None

    def begin(self, model: BatchGenerator, adapter: Composition | None, tenant: str) -> Row:
        """Prepare an answer. Raises as ``BatchGenerator.begin``; ConfigError: a value is out of range."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        sampling = most, self.temperature, self.top_p, 0, self.seed, tuple(self.stop)
        params = SamplingParams(*sampling, guide=self.response_format.guide if self.response_format else None)
        said = [ChatMessage(one.role.replace("developer", "system"), one.content) for one in self.messages]
        return model.begin(said or self.prompt, params, adapter, tenant)


class RequestError(EdgeAdaptError):
    """A request that is not answered."""

    def __init__(self, status: int, message: str, about: str = "request", **headers: str) -> None:
        super().__init__(message, about=about)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(slots=True)
class Account:
    """A tenant at work."""

    name: str
    settings: TenantSettings
    left: float = math.inf  # of its quota; below 0 after a request of many texts
    waiting: int = 0  # requests
    _at: float = 0.0

    def charge(self) -> None:
        """Take a request from the quota. Raises RequestError: it is used up."""
        now, most = time.monotonic(), self.settings.requests_per_minute
        self.left, self._at = min(most, self.left + (now - self._at) * most / 60), now
        if self.left < 1:
            wait = str(math.ceil((1 - self.left) * 60 / most))
            raise RequestError(429, f"{most} requests a minute are used up; retry in {wait} s", retry_after=wait)
        self.left -= 1

    def may(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.settings.adapters)


class Seats:
    """Gives seats to those who wait: to the tenant that has the fewest, and among equals to the one that was served
    longest ago."""

    def __init__(self, count: int) -> None:
        self.free, self._clock = count, itertools.count(1)
        self._held, self._served = defaultdict[str, int](int), defaultdict[str, int](int)  # the second: when
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    async def take(self, tenant: str) -> None:
        if self.free:  # then nobody waits
            return self._give(tenant)
        self._waiting.append(mine := (tenant, asyncio.get_running_loop().create_future()))
        try:
            await mine[1]
        except asyncio.CancelledError:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:
                self.leave(tenant)
            raise

    def leave(self, tenant: str) -> None:
        self._held[tenant] -= 1
        self.free += 1
        if self._waiting:
            first = min(self._waiting, key=lambda one: (self._held[one[0]], self._served[one[0]]))
            self._waiting.remove(first)
            self._give(first[0])
            first[1].set_result(None)

    def _give(self, tenant: str) -> None:
        self.free -= 1
        self._held[tenant] += 1
        self._served[tenant] = next(self._clock)

    @asynccontextmanager
    async def one(self, tenant: str) -> AsyncGenerator[None, None]:
        await self.take(tenant)
        try:
            yield
        finally:
            self.leave(tenant)


@dataclass(slots=True, eq=False)
class _Row:
    text: str
    adapter: Composition
    top: int
    tenant: str
    found: Any = None  # a Ranking, or the error


class Service:
    """The endpoints of a bundle, for one event loop."""

    def __init__(self, library: Library, tenants: Tenants | None, threads: int, nbytes: int) -> None:
        """Load the base. Without ``tenants``, whoever can connect may use every adapter. ``nbytes``: of the adapters in
        memory. Raises as ``ClassificationSession.of`` and ``BatchGenerator.of``."""
        writes, opened = library.manifest.task == "text-generation", (library, threads, LOADED, nbytes)
        self._model: Any = BatchGenerator.of(*opened) if writes else ClassificationSession.of(*opened)
        given = {"token_sha256": "0" * 64, "adapters": ["*"], "waiting": MAX_WAITING, "requests_per_minute": 10**9}
        everybody = TenantSettings.parse({**given, "metrics": True}, "tenants")
        self._everybody = None if tenants else Account("", everybody)
        self._accounts = list[Account]()
        self._file, self._stamp, self._again = Path(), 0, math.inf
        self._admit(tenants)
        self._library, self._turn, self._rows = library, Seats(1), list[_Row]()
        self._waiting, self._fetching, self._beginning = 0, anyio.CapacityLimiter(1), anyio.CapacityLimiter(1)
        self._written: dict[Row, asyncio.Queue[Part | Exception]] = {}
        self._seats = Seats(2 * ROWS)  # of rows, which hold their adapters in memory
        self._steps: asyncio.Task[None] | None = None
        self.stops: Callable[[], bool] = lambda: False
        self._calls: dict[str, Callable[[Request, Account], Awaitable[Response]]]
        self._calls = {"/v1/models": self._models, ONE_MODEL: self._model_named, "/metrics": self._metrics}
        if writes:
            self._calls |= {"/v1/chat/completions": self._write, "/v1/completions": self._write}
        else:
            self._calls |= {"/v1/classify": self._classify, "/v1/embeddings": self._embed}
        of: dict[str, Any] = {"namespace": "edgeadapt", "registry": CollectorRegistry()}
        self._registry = of["registry"]
        self._requests = Counter("requests", "Requests.", ["tenant", "path", "status"], **of)
        self._tokens = Counter("tokens", "Tokens that were read or written.", ["tenant", "kind"], **of)
        self._seconds = Histogram("seconds", "Seconds until an answer, or its first part.", ["path"], **of)
        self._runs = Histogram("rows", "Texts, or answers, of a run.", buckets=[2**n for n in range(5)], **of)
        Gauge("waiting", "Texts and answers that wait.", **of).set_function(lambda: self._waiting)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._calls)

    def application(self, hosts: Sequence[str]) -> Starlette:
        """Make the web application. ``hosts``: names by which it may be called, or ``*``: a foreign site whose name
        resolves to this machine is refused, and so is a page of another host."""
        gets = self._models, self._model_named, self._metrics
        routes = [
            Route(path, partial(self._answer, path), methods=["GET" if call in gets else "POST"])
            for path, call in self._calls.items()
        ]
        routes.append(Route("/health", lambda _: Response("ok\n")))
        guards = [Middleware(Guard, hosts)]
        app = Starlette(routes=routes, middleware=guards, exception_handlers={HTTPException: self._no_call})
        app.router.redirect_slashes = False
        return app

    async def _no_call(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # it is a handler of these
        called = f"{request.method[:20]} {request.scope['path'][:80]}"
        reason = f"this bundle does not answer {called}, but {', '.join(self._calls)}"
        return refusal(RequestError(error.status_code, reason), error.headers)

    async def _answer(self, path: str, request: Request) -> Response:
        begun, tenant = time.perf_counter(), ""
        try:
            account = self._account(request)
            tenant = account.name
            response = await self._calls[path](request, account)
        except ClientDisconnect:
            response = Response(status_code=499)  # as nginx counts it
        except Exception as error:  # a log of it could have a text
            response = refusal(error)
        self._requests.labels(tenant, path, response.status_code).inc()
        self._seconds.labels(path).observe(time.perf_counter() - begun)
        return response

    def watch(self, file: Path) -> None:
        """Read the tenants again when ``file`` changes. One that is wrong changes nothing."""
        self._file, self._again = file, time.monotonic()

    def _reread(self) -> None:
        self._again = time.monotonic() + REREAD
        with suppress(OSError):
            if (stamp := self._file.stat().st_mtime_ns) != self._stamp:
                self._stamp = stamp
                try:
                    self._admit(Tenants.read(self._file))
                except ConfigError as error:
                    log.warning("the tenants stay as they were: %s", error)

    def _admit(self, tenants: Tenants | None) -> None:
        """Take tenants in place of those before; one that stays has the quota and requests that it had."""
        known, self._accounts = {one.name: one for one in self._accounts}, []
        for name, settings in tenants.tenants.items() if tenants else ():
            self._accounts.append(known.get(name) or Account(name, settings))
            self._accounts[-1].settings = settings

    def _account(self, request: Request) -> Account:
        if self._everybody:
            return self._everybody
        if time.monotonic() > self._again:
            self._reread()
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found = [one for one in self._accounts if compare_digest(one.settings.token_sha256, digest)]
        if scheme.lower() != "bearer" or not found:
            raise RequestError(401, "send a tenant's token: Authorization: Bearer TOKEN", www_authenticate="Bearer")
        return found[0]

    def _parts_of(self, account: Account, model: str) -> list[str]:
        """Read the name of a model. Raises RequestError, alike: there is none, or the tenant may not use it."""
        bank, parts = self._library.bank, list[str]()
        with suppress(ConfigError):
            parts = [part.name for part in Composition.parse(model).parts]
        if not parts or not all(account.may(name) and (bank.has(name) or name in bank.versions()) for name in parts):
            raise RequestError(404, "there is no such model; GET /v1/models lists yours", "model")
        return parts

    async def _named(self, account: Account, model: str) -> Composition:
        """Read the name of a model, and fetch what of it is on the channel only: others are answered meanwhile. Raises
        as ``_parts_of`` and ``AdapterBank.bring``."""
        bank = self._library.bank
        for name in (one for one in self._parts_of(account, model) if not bank.has(one)):
            await anyio.to_thread.run_sync(bank.bring, name, limiter=self._fetching)
        return Composition.parse(model)

    def _of(self, account: Account) -> list[str]:
        names = {*self._library.names(), *self._library.bank.versions()}
        return sorted(name for name in names if account.may(name))

    @contextmanager
    def _place(self, account: Account, count: int) -> Iterator[None]:
        """Hold a place in the queue. Raises RequestError: it is full, or the server stops."""
        if self.stops() or account.waiting >= account.settings.waiting or self._waiting + count > MAX_WAITING:
            raise RequestError(503, "the queue is full; retry in a second", retry_after="1")
        account.waiting, self._waiting = account.waiting + 1, self._waiting + count
        try:
            yield
        finally:
            account.waiting, self._waiting = account.waiting - 1, self._waiting - count

    async def _parts(self, account: Account, work: Generator[T, None, None]) -> AsyncGenerator[T, None]:
        """Yield what ``work`` yields, in its turn; closing this ends it, after the step under way."""
        with self._place(account, 1):
            async with self._turn.one(account.name):
                self._check_open()
                try:
                    while (part := await anyio.to_thread.run_sync(next, work, END)) is not END:
                        yield part  # type: ignore[misc]
                finally:
                    work.close()

    async def _answers(
        self, account: Account, asked: WrittenRequest, adapter: Composition | None
    ) -> AsyncGenerator[Any, None]:
        """Yield the pieces of an answer, then the ``Answer``; closing this ends it, after the step under way."""
        with self._place(account, 1):
            row = await self._seated(account.name, partial(asked.begin, self._model, adapter, account.name))
            parts = self._written[row] = asyncio.Queue()
            self._model.add(row)
            if self._steps is None or self._steps.done():
                self._steps = asyncio.create_task(self._step())
            try:
                part: Part | Exception = ""
                while not isinstance(part, Answer):
                    if isinstance(part := await parts.get(), Exception):
                        raise part
                    yield part
            finally:
                del self._written[row]
                self._leave(row)

    async def _seated(self, tenant: str, begin: Callable[[], Row]) -> Row:
        """Begin an answer in its turn. Raises RequestError: the server stops; and as ``begin``."""
        await self._seats.take(tenant)
        try:
            self._check_open()
            return await anyio.to_thread.run_sync(begin, limiter=self._beginning)
        except BaseException:
            self._seats.leave(tenant)
            raise

    def _leave(self, row: Row) -> None:
        """Give the seat of a row that has ended, or whose reader has gone, to another; once."""
        if not row.gone:
            row.gone = True
            self._seats.leave(row.owner)

    async def _step(self) -> None:
        """Let the model write until nobody waits for an answer. A reader who is slow keeps no other waiting."""
        while not self._model.idle:
            try:
                parts = await anyio.to_thread.run_sync(self._model.step)
            except Exception as error:
                parts = [(row, error) for row in self._model.clear()]
            self._runs.observe(self._model.writing)
            for row, part in parts:
                if row in self._written:
                    self._written[row].put_nowait(part)
                if not isinstance(part, str):
                    self._leave(row)

    def _check_open(self) -> None:
        if self.stops():
            raise RequestError(503, "the server stops")

    async def _rank(self, account: Account, mine: Sequence[_Row]) -> list[Ranking]:
        """Rank rows, with what else waits when it is their turn. A client that hangs up while they run leaves the other
        rows their answers: a thread that was begun is waited for."""
        with self._place(account, len(mine)):
            self._rows += mine
            try:
                while any(row.found is None for row in mine):
                    async with self._turn.one(account.name):
                        self._check_open()
                        if (run := self._next_rows()) and any(row.found is None for row in mine):
                            texts, top = [(row.text, row.adapter) for row in run], max(row.top for row in run)
                            self._runs.observe(len(run))
                            found = await anyio.to_thread.run_sync(self._model.rankings, texts, top)
                            for row, one in zip(run, found, strict=True):
                                row.found = one
                            self._rows = [row for row in self._rows if row.found is None]
            finally:
                self._rows = [row for row in self._rows if row not in mine]
        for row in mine:
            if isinstance(row.found, EdgeAdaptError):
                raise row.found
        return [row.found for row in mine]

    def _next_rows(self) -> list[_Row]:
        """Return the rows of the next run, one of each tenant in turn."""
        before = defaultdict[str, int](int)

        def turn(row: _Row) -> int:
            before[row.tenant] += 1
            return before[row.tenant]

        return sorted(self._rows, key=turn)[:MAX_ROWS]

    async def _models(self, _: Request, account: Account) -> Response:
        names = self._of(account)
        names += [AUTO] * (ROUTER in names)
        return JSONResponse({"object": "list", "data": [_listing(name) for name in [*names, BASE]]})

    async def _model_named(self, request: Request, account: Account) -> Response:
        name = request.path_params["model"]
        if name not in (BASE, *[AUTO] * (ROUTER in self._of(account))):
            self._parts_of(account, name)
        return JSONResponse(_listing(name))

    async def _metrics(self, _: Request, account: Account) -> Response:
        if not account.settings.metrics:
            raise RequestError(403, "this tenant may not read the metrics; its table needs metrics = true")
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _classify(self, request: Request, account: Account) -> Response:
        asked = await _read(request, account, TextsRequest)
        auto = asked.model == AUTO
        names = [await self._named(account, ROUTER if auto else asked.model)] * len(asked.input)
        if auto:
            rows = [_Row(text, names[0], 1, account.name) for text in asked.input]
            routed = await _unless_gone(request, self._rank(account, rows))
            chosen = [await anyio.to_thread.run_sync(self._model.route, one, account.may) for one in routed]
            names = [await self._named(account, name) for name in chosen]
        texts = list(zip(asked.input, names, strict=True))
        if asked.words:
            return await self._label_words(request, account, asked.model, texts)
        rows = [_Row(text, name, asked.top, account.name) for text, name in texts]
        found = await _unless_gone(request, self._rank(account, rows))
        data = [{"index": index, "adapter": str(names[index]), **one.to_json()} for index, one in enumerate(found)]
        for row in data:
            row["intents"] = row["intents"][: asked.top]  # a run is for the most that one of its texts needs
        return JSONResponse({"object": "list", "model": asked.model, "data": data})

    async def _label_words(
        self, request: Request, account: Account, model: str, texts: Sequence[tuple[str, Composition]]
    ) -> Response:
        marked, rows = list[list[tuple[str, str]]](), list[_Row]()
        for text, name in texts:
            marked.append(await anyio.to_thread.run_sync(self._model.marked, text, name, limiter=self._beginning))
            rows += [_Row(one, name, 1, account.name) for _, one in marked[-1]]
            if len(rows) > MAX_TEXTS:
                raise RequestError(400, f"the texts have more than {MAX_TEXTS} words: send fewer at once")
        account.left -= len(rows) - len(texts)
        found = iter(await _unless_gone(request, self._rank(account, rows)))
        data = [
            {"index": index, "adapter": str(name)}
            | words_to_json(text, [(word, next(found).label_of_word()) for word, _ in marked[index]])
            for index, (text, name) in enumerate(texts)
        ]
        return JSONResponse({"object": "list", "model": model, "data": data})

    async def _embed(self, request: Request, account: Account) -> Response:
        asked = await _read(request, account, TextsRequest)
        if asked.model != BASE:
            await self._named(account, asked.model)
        tokens = sum(map(self._model.size, asked.input))  # refuses what cannot be read
        runs = (asked.input[at : at + MAX_ROWS] for at in range(0, len(asked.input), MAX_ROWS))
        parts = self._parts(account, (self._model.embed(texts) for texts in runs))
        vectors = [row.astype("<f4") for part in await _unless_gone(request, _listed(parts)) for row in part]
        coded = asked.encoding_format == "base64"
        rows = [base64.b64encode(row.tobytes()).decode() if coded else row.tolist() for row in vectors]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        usage = self._usage(account, prompt_tokens=tokens)
        return JSONResponse({"object": "list", "model": BASE, "data": data, "usage": usage})

    async def _write(self, request: Request, account: Account) -> Response:
        asked, chat = await _read(request, account, WrittenRequest), request.scope["path"].startswith("/v1/chat")
        adapter = None if asked.model == BASE else await self._named(account, asked.model)
        parts = self._answers(account, asked, adapter)
        kind = ("chat.completion" + ".chunk" * asked.stream) if chat else "text_completion"
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}

        def shown(text: str, last: Answer | None = None, **role: str) -> dict[str, Any]:
            finish = last and FINISHES.get(last.finish, "stop")
            said = {"delta" if asked.stream else "message": {**role, "content": text}} if chat else {"text": text}
            return {**head, "choices": [{"index": 0, **said, "finish_reason": finish}]}

        async def events(part: Any) -> AsyncGenerator[str, None]:
            async with aclosing(parts):
                try:
                    yield _event(shown("", role="assistant"))
                    while not isinstance(part, Answer):
                        yield _event(shown(part))
                        part = await anext(parts)
                    yield _event(shown("", part))
                    counted = self._usage(account, prompt_tokens=part.prompt_tokens, completion_tokens=part.tokens)
                    if asked.stream_options and asked.stream_options.include_usage:
                        yield _event({**head, "choices": [], "usage": counted})
                except Exception as error:
                    yield f"data: {_body(error).decode()}\n\n"
            yield "data: [DONE]\n\n"

        if asked.stream:
            first = await _unless_gone(request, anext(parts))  # whose error has a status
            return StreamingResponse(events(first), media_type="text/event-stream")
        *pieces, last = await _unless_gone(request, _listed(parts))
        usage = self._usage(account, prompt_tokens=last.prompt_tokens, completion_tokens=last.tokens)
        return JSONResponse({**shown("".join(pieces), last, role="assistant"), "usage": usage})

    def _usage(self, account: Account, **counts: int) -> dict[str, int]:
        for kind, count in counts.items():
            self._tokens.labels(account.name, kind).inc(count)
        return {**counts, "total_tokens": sum(counts.values())}


def _listing(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "edgeadapt"}


def _event(row: dict[str, Any]) -> str:
    return f"data: {json.dumps(row, ensure_ascii=False)}\n\n"


async def _listed(parts: AsyncGenerator[T, None]) -> list[T]:
    async with aclosing(parts):
        return [part async for part in parts]


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Await an answer. Raises ClientDisconnect, and ends it, if the client hangs up before."""
    with anyio.CancelScope() as scope:
        gone = asyncio.ensure_future(request.receive())  # the body was read: nothing else can come
        gone.add_done_callback(lambda _: scope.cancel())
        try:
            return await answer
        finally:
            gone.cancel()
    raise ClientDisconnect


R = TypeVar("R", TextsRequest, WrittenRequest)


async def _read(request: Request, account: Account, kind: type[R]) -> R:
    """Read the body of a request, which counts. Raises RequestError: it is too large or slow, or the quota is used up;
    ConfigError: it is not what ``kind`` describes."""
    account.charge()
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY:
                    body += part
                elif size > MAX_UNREAD:
                    break
    except TimeoutError as error:
        raise RequestError(408, f"the body did not come within {PATIENCE:.0f} s", connection="close") from error
    if size > MAX_BODY:  # only now: a client that is still sending would not read it
        raise RequestError(413, f"the body has more than {MAX_BODY} bytes; send less", connection="close")
    asked = kind.parse(bytes(body), "the request")
    account.left -= len(getattr(asked, "input", ".")) - 1  # each text counts
    return asked


def _status(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, DataError) and not error.about.startswith(SENT):
        return 422  # the adapter is broken
    if getattr(error, "about", "") in ("repository", "repository.expired"):
        return 503  # it is away or was not renewed, and the adapter is not here
    if isinstance(error, TrustError):
        return 409
    return 400 if isinstance(error, ConfigError | DataError) else 500


def _body(error: Exception) -> bytes:
    line = str(error) if isinstance(error, EdgeAdaptError) else f"the server failed: {type(error).__name__}"
    return error_body(_status(error), line, getattr(error, "about", None))


def refusal(error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    """Say in one line why a request is not answered."""
    more = headers or getattr(error, "headers", None)
    return Response(_body(error), _status(error), more, "application/json")


class Guard:
    """Refuses requests by another name of this machine, and those of a page of another host: a browser sends them
    without asking, and a model would run for them."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        respond: ASGIApp = self._app
        if scope["type"] == "http" and "*" not in self._hosts:
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            origin = headers.get("origin", host).rpartition("//")[2]
            for status, name in ((403, origin), (400, host)):
                if name.partition(":")[0] not in self._hosts:
                    reason = f"{name[:80]!r} is not a name of this server: {', '.join(self._hosts)}"
                    respond = refusal(RequestError(status, reason))
        await respond(scope, receive, send)


class Runner(uvicorn.Server):
    """Serves HTTP and, beside it, ``calls`` of gRPC, until both have ended."""

    calls: Any = None

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        ended = asyncio.ensure_future(self.calls.stop(PATIENCE)) if self.calls else None
        await super().shutdown(sockets)
        for connection in self.server_state.connections if self.force_exit else ():
            assert isinstance(connection, Connection)  # noqa: S101  # of ``server_of``
            connection.abandon()
        if ended and not self.force_exit:
            await ended


def server_of(service: Service, hosts: Sequence[str], tls: tuple[Path, Path] | None) -> Runner:
    """Make what serves a socket until SIGINT or SIGTERM, and ends after the running answer; at once after a second one.
    ``tls``: certificate and key. Raises ConfigError: they cannot be used."""
    config = uvicorn.Config(
        service.application(hosts),
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",  # of which uvicorn would log that a second SIGINT ends it
        proxy_headers=False,  # who is on this machine could claim any address
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=IDLE,
        ssl_certfile=tls and str(tls[0]),
        ssl_keyfile=tls and str(tls[1]),
    )
    try:
        config.load()
    except OSError as error:  # also of OpenSSL
        raise ConfigError(f"the certificate or its key cannot be used: {error}", about="--certificate") from error
    runner = Runner(config)
    service.stops = lambda: runner.should_exit
    return runner
