"""Record spans with OpenTelemetry's SDK, and send them by OTLP over HTTP. ``edgeadapt.traces`` imports this if asked.
The SDK reads its standard environment variables: address, headers, certificates, sampler, sizes."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from aggregation.errors import ConfigError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
FLUSH = 5.0  # seconds for what is left at the end
log = logging.getLogger("edgeadapt.traces")


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


@contextmanager
def tracing(service: str) -> Iterator[trace.Tracer]:
    """Send spans while the block runs, then what is left, for ``FLUSH`` seconds at most; as ``traces.exporting``."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # ``_Exporter`` says what there is to say
    try:
        resource = Resource.create({SERVICE_NAME: service}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = BatchSpanProcessor(_Exporter())
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"an OTEL_ variable is not valid: {reason}", about="traces") from error
    provider.add_span_processor(processor)
    try:
        yield provider.get_tracer("edgeadapt")
    finally:
        ending = threading.Thread(target=processor.shutdown, daemon=True)  # takes no time limit itself
        ending.start()
        ending.join(FLUSH)
