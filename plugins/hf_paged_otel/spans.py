"""A finished request -> its spans."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from hf_paged.server.stats import RequestRecord

_FAILED = ("error", "deadline", "queue_timeout")
_propagator = TraceContextTextMapPropagator()


class Listener:
    """Makes the spans of a request once it is over, with the times that it had: while it runs, tracing costs nothing.

    Args:
        tracer: makes spans.
    """

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def request_finished(self, record: RequestRecord) -> None:
        """A request is over."""
        carrier = {"traceparent": record.traceparent} if record.traceparent else {}
        span = self._tracer.start_span(
            f"llm_request {record.model}",
            context=_propagator.extract(carrier),  # the caller's span is the parent, and its sampling counts
            kind=SpanKind.SERVER,
            start_time=record.start_ns,
            attributes=attributes(record),
        )
        if record.finish_reason in _FAILED:
            span.set_status(StatusCode.ERROR, record.error or record.finish_reason)
        inside = trace.set_span_in_context(span)
        for name, start, end, more in phases(record):
            self._tracer.start_span(name, inside, start_time=start, attributes=more).end(end)
        span.end(record.end_ns)


def phases(record: RequestRecord) -> list[tuple[str, int, int, dict[str, Any]]]:
    """The phases that a request went through: name, start and end in nanoseconds, attributes.

    The engine's clock measured how long they were. They follow each other from the request's start, and none lies
    beyond its end.
    """
    details: dict[str, dict[str, Any]] = {
        "queue": {},
        "prefill": {"gen_ai.usage.input_tokens": record.prompt_tokens, "hf_paged.cached_tokens": record.cached_tokens},
        "decode": {"gen_ai.usage.output_tokens": record.output_tokens, "hf_paged.preemptions": record.preemptions},
    }
    seconds = {name: getattr(record, name) for name in details}
    known = [name for name, value in itertools.takewhile(lambda item: item[1] is not None, seconds.items())]
    found, at, last = [], record.start_ns, record.end_ns or record.start_ns
    for name in known:
        end = min(at + int(1e9 * seconds[name]), last)
        found.append((name, at, end, details[name]))
        at = end
    return found


def attributes(record: RequestRecord) -> dict[str, Any]:
    """What is told of a request, under OpenTelemetry's names for generative AI where it has one."""
    found = {
        "gen_ai.operation.name": "chat" if record.endpoint.endswith("/chat/completions") else "text_completion",
        "gen_ai.provider.name": "hf_paged",
        "gen_ai.request.model": record.model,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.request.choice.count": record.n,
        "gen_ai.response.id": record.client_id,
        "gen_ai.response.finish_reasons": [record.finish_reason or "error"],
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "url.path": record.endpoint,
        "hf_paged.request_id": record.request_id,
        "hf_paged.cached_tokens": record.cached_tokens,
        "hf_paged.index": record.index,
        "hf_paged.stream": record.stream,
        "hf_paged.replica": record.replica,
        "hf_paged.preemptions": record.preemptions,
        "hf_paged.resumed": record.resumed,
        "hf_paged.time_to_first_token": record.time_to_first_token,
        "hf_paged.longest_gap": record.gap_max,
    }
    return {name: value for name, value in found.items() if value is not None}
