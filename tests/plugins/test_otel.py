"""Traces: a span a request, its phases inside, under the caller's own span; nothing unless asked for."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import hf_paged_otel
from hf_paged import ConfigError
from hf_paged_otel.spans import Listener, phases
from traffic import Traffic

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def traffic():
    """The traffic of a server, its spans kept in `traffic.spans`."""
    traffic = Traffic(hf_paged_otel)
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traffic.stats.subscribe(Listener(provider.get_tracer("test")))
    traffic.spans = lambda: {span.name: span for span in exporter.get_finished_spans()}
    return traffic


def finished(traffic, reason="stop", **fields):
    record = traffic.start("a", endpoint="/v1/chat/completions", **fields)
    record.start_ns -= 2_000_000_000  # it began two seconds ago
    traffic.bring(record, 3, cached=4)
    traffic.end(record, reason)
    return record


def test_a_request_is_a_span_with_its_phases_inside(traffic):
    record = finished(traffic)
    spans = traffic.spans()
    assert set(spans) == {"llm_request tiny", "queue", "prefill", "decode"}
    whole = spans["llm_request tiny"]
    assert (whole.start_time, whole.end_time) == (record.start_ns, record.end_ns)
    assert whole.status.status_code is not StatusCode.ERROR
    at = whole.start_time
    for name, seconds in (("queue", 0.1), ("prefill", 0.2), ("decode", 0.4)):
        assert spans[name].parent.span_id == whole.context.span_id
        assert spans[name].start_time == at
        at += int(1e9 * seconds)
        assert spans[name].end_time == at


def test_attributes(traffic):
    finished(traffic, n=2, stream=True, replica=1)
    found = traffic.spans()["llm_request tiny"].attributes
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == "tiny"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (10, 3)
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert found["gen_ai.response.id"] == "call-a"
    assert (found["hf_paged.cached_tokens"], found["hf_paged.replica"], found["hf_paged.stream"]) == (4, 1, True)
    assert traffic.spans()["prefill"].attributes["hf_paged.cached_tokens"] == 4


def test_the_callers_span_is_the_parent(traffic):
    finished(traffic, traceparent=PARENT)
    span = traffic.spans()["llm_request tiny"]
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]


@pytest.mark.parametrize("header", [None, "nonsense", "00-0-0-00"])
def test_without_a_caller_it_is_a_root(traffic, header):
    finished(traffic, traceparent=header)
    assert traffic.spans()["llm_request tiny"].parent is None


def test_a_caller_that_does_not_sample_gets_no_spans(traffic):
    finished(traffic, traceparent=PARENT[:-2] + "00")
    assert not traffic.spans()


def test_failures_are_errors(traffic):
    record = traffic.start("a")
    traffic.stats.ended(record, "error", "the engine died twice")
    span = traffic.spans()["llm_request tiny"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "the engine died twice"
    assert set(traffic.spans()) == {"llm_request tiny"}  # the engine told no phases


def test_phases_stay_inside_the_request(traffic):
    record = traffic.start("a")
    traffic.end(record)  # over at once, though the engine told 0.7 s
    assert all(record.start_ns <= start <= end <= record.end_ns for _, start, end, _ in phases(record))


# -------------------------------------------------------------------------------------------------------- on, and off


def test_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("HF_PAGED_TRACES", raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # a platform may set it for everybody
    traffic = Traffic(hf_paged_otel)
    assert not traffic.stats._listeners
    assert not traffic.lifecycle.on_stop


def test_spans_reach_a_collector(monkeypatch):
    bodies = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_PAGED_TRACES", "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        traffic = Traffic(hf_paged_otel)
        finished(traffic)
        (shutdown,) = traffic.lifecycle.on_stop
        shutdown()
        server.shutdown()
    ((path, body),) = bodies
    assert path == "/v1/traces"
    assert b"llm_request tiny" in body
    assert b"prefill" in body


def test_console(monkeypatch, capsys):
    monkeypatch.setenv("HF_PAGED_TRACES", "console")
    traffic = Traffic(hf_paged_otel)
    finished(traffic)
    traffic.lifecycle.on_stop[0]()
    text = capsys.readouterr().err
    assert '"name": "llm_request tiny"' in text
    assert json.loads(text[: text.index("\n}") + 2])["resource"]["attributes"]["service.name"] == "hf_paged"


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("HF_PAGED_TRACES", "jaeger")
    with pytest.raises(ConfigError, match="HF_PAGED_TRACES must be one of otlp, console, got 'jaeger'"):
        Traffic(hf_paged_otel)


def test_without_the_library_it_says_which_extra(monkeypatch):
    monkeypatch.setattr(hf_paged_otel, "find_spec", lambda name: None)
    assert Traffic(hf_paged_otel)  # silent
    monkeypatch.setenv("HF_PAGED_TRACES", "otlp")
    with pytest.raises(ConfigError, match=r"pip install '.\[otel\]'"):
        Traffic(hf_paged_otel)


def test_importing_it_imports_no_opentelemetry():
    import subprocess

    code = "import hf_paged_otel, sys; print(any(name.startswith('opentelemetry') for name in sys.modules))"
    path = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
