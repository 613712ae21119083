"""Spans of OpenTelemetry: how long a session, a round, a step, a call of the gateway and a promotion took.

As with logging, code that reports does not know where to: any function may open a ``span``, and ``exporting`` says
whether one is recorded. Off, nothing of OpenTelemetry is imported (docs/decisions/0080-dashboard-and-traces.md). A span
has counts, bytes, durations, and names of steps, rounds, channels and gates. It has no name or address of a device, so
no text of an error either: those may name one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aggregation.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry import trace

COORDINATOR, GOVERNANCE = "edgeadapt-coordinator", "edgeadapt-governance"  # service.name
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
_tracer: "trace.Tracer | None" = None


@dataclass(frozen=True, slots=True)
class Span:
    """Measures something. ``recorded``: OpenTelemetry's span; None if nothing is recorded."""

    recorded: "trace.Span | None" = None

    def set(self, **attributes: str | float) -> None:
        """Note attributes; each is exported as ``edgeadapt.NAME``."""
        if self.recorded is not None:
            self.recorded.set_attributes({f"edgeadapt.{name}": value for name, value in attributes.items()})

    def fail(self, kind: str) -> None:
        """Note that it failed, and how: a closed choice, such as a reason or the type of an error."""
        if self.recorded is not None and self.recorded.is_recording():
            from opentelemetry.trace import StatusCode

            self.recorded.set_attribute("error.type", kind)
            self.recorded.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """End it. A second call does nothing."""
        if self.recorded is not None and self.recorded.is_recording():
            self.recorded.end()


NO_SPAN = Span()


def begin(name: str, *, within: Span = NO_SPAN, **attributes: str | float) -> Span:
    """Begin a span that its owner ends, for what no block of code contains. Arguments as ``span``."""
    if _tracer is None:
        return NO_SPAN
    from opentelemetry import trace

    begun = Span(_tracer.start_span(name, within.recorded and trace.set_span_in_context(within.recorded)))
    begun.set(**attributes)
    return begun


@contextmanager
def span(name: str, *, within: Span = NO_SPAN, **attributes: str | float) -> Iterator[Span]:
    """Open a span as long as the block. An error that leaves it marks it as failed, with the error's type. ``within``:
    the span that it is a part of. Default: the one of the block around it."""
    begun = begin(name, within=within, **attributes)
    if begun.recorded is None:
        yield begun
        return
    from opentelemetry import trace

    try:
        # Neither the text of an error nor its traceback: they may name a device.
        with trace.use_span(begun.recorded, record_exception=False, set_status_on_exception=False):
            yield begun
    except Exception as error:
        begun.fail(type(error).__name__)
        raise
    finally:
        begun.end()


def current() -> Span:
    if _tracer is None:
        return NO_SPAN
    from opentelemetry import trace

    return Span(trace.get_current_span())


@contextmanager
def exporting(service: str) -> Iterator[None]:
    """Record spans and send them while the block runs, if OpenTelemetry's environment variables name a receiver.

    Spans are sent by a thread of their own. Those that the receiver does not take in time are dropped. ``service`` is
    the process's ``service.name``, unless the environment has one. Raises ConfigError: the variables are not valid or
    ask for another protocol, or the extra ``traces`` is not installed."""
    global _tracer
    if not is_wanted() or _tracer is not None:
        yield
        return
    try:
        from edgeadapt.traceexport import tracing
    except ModuleNotFoundError as error:
        text = "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, which are not installed: pip install 'edgeadapt[traces]', "
        raise ConfigError(f"{text}or set OTEL_SDK_DISABLED=true", about="traces") from error
    with tracing(service) as _tracer:
        try:
            yield
        finally:
            _tracer = None


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
