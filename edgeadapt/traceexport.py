"""Record spans with OpenTelemetry's SDK, and send them by OTLP over HTTP. ``edgeadapt.traces`` imports this if asked.

The SDK reads its standard environment variables: address, headers, certificates, sampler, sizes.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, TypeAlias

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Status, StatusCode

from aggregation.errors import ConfigError

Value: TypeAlias = str | int | float | bool
PREFIX = "edgeadapt."  # of attributes
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
FLUSH = 5.0  # seconds for what is left at the end
log = logging.getLogger("edgeadapt.traces")


@dataclass(frozen=True, slots=True)
class RecordedSpan:
    span: trace.Span

    def set(self, **attributes: Value) -> None:
        self.span.set_attributes(_named(attributes))

    def fail(self, kind: str) -> None:
        if self.span.is_recording():
            self.span.set_attribute("error.type", kind)
            self.span.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        if self.span.is_recording():
            self.span.end()


class _Exporter(OTLPSpanExporter):
    """Says once that spans cannot be sent, and once that they can again, instead of a line for each attempt."""

    failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self.failing:
            log.warning("traces cannot be sent, and are dropped: look at %s and the receiver there", ENDPOINT)
        if self.failing and not failed:
            log.warning("traces can be sent again")
        self.failing = failed
        return result


@dataclass(frozen=True, slots=True)
class Tracing:
    processor: BatchSpanProcessor
    tracer: trace.Tracer

    @classmethod
    def start(cls, service: str) -> Self:
        """Begin, as the environment says. Arguments and errors as ``traces.exporting``."""
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # ``_Exporter`` says what there is to say
        try:
            resource = Resource.create({SERVICE_NAME: service}).merge(OTELResourceDetector().detect())
            provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            processor = BatchSpanProcessor(_Exporter())
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"an OTEL_ variable is not valid: {reason}", about="traces") from error
        provider.add_span_processor(processor)
        return cls(processor, provider.get_tracer("edgeadapt"))

    def stop(self) -> None:
        """Send what is left, for ``FLUSH`` seconds at most."""
        ending = threading.Thread(target=self.processor.shutdown, daemon=True)  # takes no time limit itself
        ending.start()
        ending.join(FLUSH)

    def begin(self, name: str, within: object, attributes: Mapping[str, Value]) -> RecordedSpan:
        around = trace.set_span_in_context(within.span) if isinstance(within, RecordedSpan) else None
        return RecordedSpan(self.tracer.start_span(name, around, attributes=_named(attributes)))

    @contextmanager
    def span(self, name: str, within: object, attributes: Mapping[str, Value]) -> Iterator[RecordedSpan]:
        begun = self.begin(name, within, attributes)
        try:
            # Neither the text of an error nor its traceback: they may name a device.
            with trace.use_span(begun.span, record_exception=False, set_status_on_exception=False):
                yield begun
        except Exception as error:
            begun.fail(type(error).__name__)
            raise
        finally:
            begun.end()

    def current(self) -> RecordedSpan:
        return RecordedSpan(trace.get_current_span())


def _named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{PREFIX}{name}": value for name, value in attributes.items()}
