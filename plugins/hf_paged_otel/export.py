"""Where spans go."""

from __future__ import annotations

import os
import sys

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter


def provider(kind: str) -> TracerProvider:
    """A tracer provider of the server's own, which leaves OpenTelemetry's global one alone.

    Args:
        kind: otlp or console.
    """
    name = os.environ.get("OTEL_SERVICE_NAME", "hf_paged")
    # Resource.create adds OTEL_RESOURCE_ATTRIBUTES; the provider reads OTEL_TRACES_SAMPLER by itself.
    made = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    # Spans are sent by a thread, many at a time: no request waits for a collector.
    made.add_span_processor(BatchSpanProcessor(_exporter(kind)))
    return made


def _exporter(kind: str) -> SpanExporter:
    if kind == "console":
        return ConsoleSpanExporter(out=sys.stderr)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
