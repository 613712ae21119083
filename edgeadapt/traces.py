"""Spans of OpenTelemetry: how long a session, a round, a step, a call of the gateway and a promotion took.

As with logging, code that reports does not know where to: any function may open a ``span``, and ``exporting`` says
whether one is recorded. Off, nothing of OpenTelemetry is imported (docs/decisions/0080-dashboard-and-traces.md). A span
has counts, bytes, durations, and names of steps, rounds, channels and gates. It has no name or address of a device, so
no text of an error either: those may name one.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from aggregation.errors import ConfigError

if TYPE_CHECKING:
    from edgeadapt.traceexport import Tracing, Value

COORDINATOR, GOVERNANCE = "edgeadapt-coordinator", "edgeadapt-governance"  # service.name
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"


class Span(Protocol):
    """Measures something: ``traceexport.RecordedSpan``, or ``NO_SPAN``, which is not recorded."""

    def set(self, **attributes: "Value") -> None: ...

    def fail(self, kind: str) -> None:
        """Note that it failed, and how: a closed choice, such as a reason or the type of an error."""

    def end(self) -> None:
        """End it. A second call does nothing."""


class _NoSpan:
    __slots__ = ()

    def set(self, **attributes: "Value") -> None:
        pass

    def fail(self, kind: str) -> None:
        pass

    def end(self) -> None:
        pass


NO_SPAN: Span = _NoSpan()
_OFF = nullcontext(NO_SPAN)
_tracing: "Tracing | None" = None


def begin(name: str, *, within: Span | None = None, **attributes: "Value") -> Span:
    """Begin a span that its owner ends, for what no block of code contains. Arguments as ``span``."""
    return NO_SPAN if _tracing is None else _tracing.begin(name, within, attributes)


def span(name: str, *, within: Span | None = None, **attributes: "Value") -> AbstractContextManager[Span]:
    """Open a span as long as the block. An error that leaves it marks it as failed, with the error's type.

    ``within``: the span that it is a part of. Default: the one of the block around it. ``attributes``: each is exported
    as ``edgeadapt.NAME``.
    """
    return _OFF if _tracing is None else _tracing.span(name, within, attributes)


def current() -> Span:
    return NO_SPAN if _tracing is None else _tracing.current()


@contextmanager
def exporting(service: str) -> Iterator[None]:
    """Record spans and send them while the block runs, if OpenTelemetry's environment variables name a receiver.

    Spans are sent by a thread of their own. Those that the receiver does not take in time are dropped. ``service`` is
    the process's ``service.name``, unless the environment has one. Raises ConfigError: the variables are not valid or
    ask for another protocol, or the extra ``traces`` is not installed.
    """
    global _tracing
    if not is_wanted() or _tracing is not None:
        yield
        return
    try:
        from edgeadapt.traceexport import Tracing
    except ModuleNotFoundError as error:
        text = "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, which are not installed: pip install 'edgeadapt[traces]', "
        raise ConfigError(f"{text}or set OTEL_SDK_DISABLED=true", about="traces") from error
    _tracing = Tracing.start(service)
    tracing = _tracing
    try:
        yield
    finally:
        _tracing = None
        tracing.stop()


def is_wanted() -> bool:
    """Check whether the environment names a receiver of traces. Raises ConfigError if it cannot be used."""
    name = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if name is None or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if exporter == "none":
        return False
    if exporter != "otlp":
        raise ConfigError(f"OTEL_TRACES_EXPORTER is {exporter}: choose otlp or none", about="OTEL_TRACES_EXPORTER")
    protocol = next((each for each in PROTOCOLS if os.environ.get(each)), None)  # the special one goes first
    if protocol is not None and (stated := os.environ[protocol]) != PROTOCOL:
        raise ConfigError(f"{protocol} is {stated}: choose {PROTOCOL}", about=protocol)
    try:
        url = urlsplit(os.environ[name])
        usable = url.scheme in ("http", "https") and url.hostname is not None and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{name} is not an http or https address, as https://collector.example:4318", about=name)
    if url.username or url.password:
        raise ConfigError(f"{name} has a password: put it into OTEL_EXPORTER_OTLP_HEADERS", about=name)
    return True
