"""Bodies that JSON, or a step after it, can't carry: 400 with the field's name, in every field of every route."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from server import fakes
from server.conftest import ServerProcess, events
from server.test_server import error_of

from hf_paged import PagedConfig, hookimpl, strict_json
from hf_paged.server import logs
from hf_paged.server.routes import ROUTERS

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
DEEP = "[" * 600 + "]" * 600
# As text: json.dumps would not write all of them.
WRONG = {
    "lone surrogate": '"a\\ud83d"',
    "the other half": '"\\uDE00b"',
    "surrogates in the wrong order": '"\\ude00\\ud83d"',
    "surrogate in a list": '["ok", "\\udfff"]',
    "surrogate as a key": '{"\\ud800": 1}',
    "surrogate under keys": '{"a": {"b": ["\\ud83d x"]}}',
    "600 arrays": DEEP,
    "600 objects": '{"a":' * 600 + "1" + "}" * 600,
    "129 arrays": "[" * 129 + "]" * 129,
    "100,000 arrays": "[" * 100_000 + "]" * 100_000,
    "NaN": "NaN",
    "Infinity": "Infinity",
    "minus Infinity in a list": "[1, -Infinity]",
    "2^64": str(2**64),
    "minus 2^63 minus 1": str(-(2**63) - 1),
    "10^400 in an object": '{"a": 1' + "0" * 400 + "}",
    "5,000 digits": "9" * 5000,
    "an exponent": "1e999",
    "a negative exponent's number": "-2.5E+400",
    "bytes that are not UTF-8": '"a\udcff"',  # written as the byte
}
# One of each kind, for the fields, which are many.
SHORT = (
    "lone surrogate",
    "surrogate as a key",
    "600 objects",
    "NaN",
    "2^64",
    "an exponent",
    "bytes that are not UTF-8",
)
MINIMAL = {
    "/v1/completions": '"prompt": "x"',
    "/v1/chat/completions": '"messages": [{"role": "user", "content": "x"}]',
    "/v1/responses": '"input": "x"',
    "/tokenize": '"prompt": "x"',
    "/detokenize": '"tokens": [5]',
}


def send(app: FastAPI, path: str, text: str) -> httpx.Response:
    content = text.encode("utf-8", "surrogateescape")
    return fakes.call(app, "POST", path, content=content, headers={"Content-Type": "application/json"})


def properties(app: FastAPI, path: str) -> Iterator[str]:
    schema = app.openapi()
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    yield from schema["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"]


@pytest.mark.parametrize("path", ROUTES)
def test_values_that_cannot_be_carried_are_refused_in_every_field(path: str) -> None:
    app = fakes.application(fakes.FakeEngine())
    fields = [*properties(app, path), "a_field_that_there_is_not"]
    assert len(fields) > 2
    for field in fields:
        for kind in SHORT:
            value = WRONG[kind]
            first = "" if f'"{field}"' in MINIMAL[path] else MINIMAL[path] + ", "
            response = send(app, path, f'{{{first}"{field}": {value}}}')
            assert response.status_code == 400, (field, kind, response.text)
            error = error_of(response)
            assert error["param"].split(".")[0] == field, (field, kind, error)
            assert field in error["message"]
            assert len(error["message"]) < 1000


PLACES = {
    "/v1/chat/completions": {
        "messages.0.content": '{"messages": [{"role": "user", "content": %s}]}',
        "messages.0.content.0.text": '{"messages": [{"role": "user", "content": [{"type": "text", "text": %s}]}]}',
        "messages.0.tool_calls.0.function.arguments": '{"messages": [{"role": "assistant", "tool_calls": '
        '[{"function": {"name": "f", "arguments": %s}}]}]}',
        "tools.0.function.parameters.properties.a.enum": '{"messages": [], "tools": [{"type": "function", "function": '
        '{"name": "f", "parameters": {"properties": {"a": {"enum": %s}}}}}]}',
        "response_format.json_schema.schema.const": '{"response_format": {"json_schema": {"schema": {"const": %s}}}}',
        "chat_template_kwargs.a": '{"chat_template_kwargs": {"a": %s}}',
        "metadata.a": '{"metadata": {"a": %s}}',
        "stop.1": '{"stop": ["x", %s]}',
        "logit_bias.5": '{"logit_bias": {"5": %s}}',
        "documents.0.title": '{"documents": [{"title": %s}]}',
        "stream_options.include_usage": '{"stream_options": {"include_usage": %s}}',
    },
    "/v1/responses": {
        "input.0.content.0.text": '{"input": [{"role": "user", "content": [{"type": "input_text", "text": %s}]}]}',
        "tools.0.parameters.a": '{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": %s}}]}',
        "text.format.schema.a": '{"text": {"format": {"schema": {"a": %s}}}}',
    },
}


@pytest.mark.parametrize("path", PLACES)
def test_what_cannot_be_carried_is_named_where_it_is(path: str) -> None:
    app = fakes.application(fakes.FakeEngine())
    for place, body in PLACES[path].items():
        for kind in ("lone surrogate", "600 arrays", "NaN", "2^64", "an exponent", "bytes that are not UTF-8"):
            error = error_of(send(app, path, body % WRONG[kind]))
            named = ".".join(place.split(".")[:8])
            assert error["param"].startswith(named), (place, kind, error)


def test_keys_that_cannot_be_carried_are_named() -> None:
    app = fakes.application(fakes.FakeEngine())
    for field in ("metadata", "logit_bias", "chat_template_kwargs", "tools"):
        for body in ('{"%s": {"a\\ud83d": 1}}', '{"%s": [{"x": {"a\\ud83d": 1}}]}', '{"%s": {"a\udcfe": 1}}'):
            response = send(app, "/v1/chat/completions", body % field)
            assert response.status_code == 400
            assert error_of(response)["param"].startswith(f"{field}.")
    response = send(app, "/v1/completions", '{"prompt": "x", "\\ud83d": 1}')
    assert (response.status_code, error_of(response)["param"]) == (400, "\\ud83d")


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_that_are_no_json_say_so(path: str) -> None:
    app = fakes.application(fakes.FakeEngine())
    wrong = ("{", '{"prompt": x}', '{"prompt": "x"}}', "\udcff", '{"prompt": \udcff}', "'x'", "{'prompt': 1}", "\x00")
    for text in (*wrong, '{"prompt": "a\nb"}', '{"prompt": "\\ud83"}', '{"a":' * 600, "undefined"):
        response = send(app, path, text)
        assert response.status_code == 400, text
        assert error_of(response)["type"] == "invalid_request_error"
    utf16 = fakes.call(
        app, "POST", path, content='{"prompt": "x"}'.encode("utf-16"), headers={"Content-Type": "application/json"}
    )
    assert utf16.status_code == 400
    for text in ("NaN", "5", '"x"', "[]", "null", "true", ""):
        assert send(app, path, text).status_code == 400
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "nonsense"):
        response = fakes.call(app, "POST", path, content=b'{"prompt": "\xff"}', headers={"Content-Type": kind})
        assert response.status_code == 400
        assert "Content-Type: application/json" in error_of(response)["message"]


def test_bodies_that_can_be_carried_are() -> None:
    app = fakes.application(fakes.FakeEngine())
    schema = {"a": {"maximum": 2**64 - 1, "minimum": -(2**63), "x": 1.7e308}}
    for _ in range(60):  # two deep each
        schema = {"a": [schema]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    text = json.dumps({"messages": [{"role": "user", "content": "😀 é"}], "tools": tools})
    assert "\\ud83d\\ude00" in text  # both halves, in their order
    assert send(app, "/tokenize", text).status_code == 200
    for kind in ("application/json", "application/json; charset=utf-8", "application/vnd.api+json"):
        body = '\ufeff{"prompt": "é"}'.encode()
        assert fakes.call(app, "POST", "/tokenize", content=body, headers={"Content-Type": kind}).status_code == 200


def test_refused_bodies_are_counted() -> None:
    app = fakes.application(fakes.FakeEngine())
    counted: list[str] = []
    app.state.stats.refused = counted.append
    send(app, "/v1/completions", '{"prompt": NaN}')
    assert counted == ["invalid"]


def test_a_plugins_routes_are_covered() -> None:
    router = APIRouter()

    @router.post("/plugin")
    async def take(body: dict[str, Any]) -> dict[str, Any]:
        return body

    class Plugin:
        @hookimpl
        def register_routes(self, app: FastAPI, config: Any) -> None:
            app.include_router(router)

    app = fakes.application(fakes.FakeEngine(), paged=PagedConfig(plugins=(Plugin(),)))
    assert send(app, "/plugin", '{"a": [1, "é"]}').json() == {"a": [1, "é"]}
    for kind, value in WRONG.items():
        response = send(app, "/plugin", f'{{"a": {{"b": {value}}}}}')
        assert response.status_code == 400, kind
        assert error_of(response)["param"].startswith("a.b")


def test_a_body_in_pieces_is_read_once() -> None:
    app = fakes.application(fakes.FakeEngine(), max_body_bytes=2000)

    async def pieces() -> Any:
        for piece in (b'{"prompt"', b': "a', b"\xc3", b"\xa9", b'"}'):
            yield piece

    response = fakes.call(
        app, "POST", "/tokenize", content=pieces(), headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert response.json()["count"] == 3

    async def long() -> Any:
        for _ in range(3):
            yield b"[" * 1500

    large = fakes.call(app, "POST", "/tokenize", content=long(), headers={"Content-Type": "application/json"})
    assert (large.status_code, error_of(large)["code"]) == (413, "body_too_large")


def test_texts_of_json_inside_a_body() -> None:
    """A call's arguments and a schema are JSON in texts: what can't be carried there harms nothing either."""
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    engine = fakes.FakeEngine(structured=True)
    app = fakes.application(engine)
    app.state.text.chat_template = template + "{{ m.content }}{% endfor %}"
    for arguments in ('{"x": "\\ud83d"}', DEEP, "[" * 100_000, "NaN", "9" * 5000, "{", "", '{"x": 1e999}'):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]
        response = fakes.call(app, "POST", "/tokenize", json={"messages": messages})
        assert response.status_code == 200, arguments[:20]
        item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments[:60]}
        assert fakes.call(app, "POST", "/v1/responses", json={"input": [item]}).status_code == 200
        body = {"prompt": "x", "structured_outputs": {"json": arguments}}
        error = error_of(fakes.call(app, "POST", "/v1/completions", json=body))
        assert error["param"] == "structured_outputs.json"


def test_the_walk_takes_time_with_the_size_alone() -> None:
    """Quadratic steps over these would take minutes."""
    for text in (json.dumps({"prompt": list(range(300_000))}), "[" * 300_000, json.dumps([{"a": "é"}] * 100_000)):
        began = time.process_time()
        with contextlib.suppress(strict_json.StrictJSONError):
            strict_json.loads(text)
        assert time.process_time() - began < 2.0


def test_a_real_server_answers_400_and_lives_on(tiny_server: ServerProcess) -> None:
    """Through uvicorn and the engine process, streams too."""
    headers = {"Content-Type": "application/json"}
    for path in ROUTES:
        for kind, value in WRONG.items():
            content = f'{{{MINIMAL[path]}, "stream": true, "user": {value}}}'.encode("utf-8", "surrogateescape")
            response = httpx.post(tiny_server.url + path, content=content, headers=headers, timeout=60)
            assert (response.status_code, error_of(response)["param"].split(".")[0]) == (400, "user"), kind
    ok = httpx.post(
        tiny_server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True}, timeout=60
    )
    assert events(ok.text)[-1]["choices"]
    assert "Traceback" not in tiny_server.text


def test_what_a_client_sent_begins_no_line_of_the_log(tiny_server: ServerProcess) -> None:
    """As a user, a request id, a path or a header; and it is no field of one, nor a control character."""
    forged = "x\r\n2026-12-01 00:00:00,000 ERROR hf_paged: FORGED\u2028\u0085FORGED\x1b[31m\u202e status=200"
    body = {"prompt": "x", "max_tokens": 1, "user": forged, "request_id": "a\nFORGED=1 b"}
    assert httpx.post(tiny_server.url + "/v1/completions", json=body, timeout=60).status_code == 200
    assert httpx.get(tiny_server.url + "/v1/models/a%0aFORGED%1b%0d", timeout=60).status_code == 404
    assert httpx.get(tiny_server.url + "/%e2%80%a8FORGED", timeout=60).status_code == 404
    lines = tiny_server.logged("FORGED", times=3)  # the finished request, and two calls
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\d \S+ INFO hf_paged\.server\.(access|requests): ", line), line
        assert line.isprintable()
    (finished,) = (line for line in lines if "requests: finished" in line)
    assert r'client_id="a\nFORGED=1 b"' in finished
    assert len(re.findall(r"(?<!\S)[a-z_]+=(?=\S)", re.sub(r'"[^"]*"', "x", finished))) >= 10


def test_a_trace_in_the_log_is_indented_and_long_fields_are_cut() -> None:
    values = {"name": "x", "levelname": "ERROR", "msg": "failed", "user": "y" * 5000, "number": 5}
    record = logging.makeLogRecord(values)
    try:
        raise ValueError("a\n2026-12-01 00:00:00,000 INFO FORGED\x1b[31m")
    except ValueError:
        record.exc_info = sys.exc_info()
    first, *others = logs.formatter("text").format(record).splitlines()
    assert first.endswith(f"ERROR x: failed user={'y' * logs.LONGEST}… number=5")
    assert others
    assert all(line.startswith("    ") and line.isprintable() for line in others)
    assert len(json.loads(logs.formatter("json").format(record))["user"]) == logs.LONGEST + 1


def test_long_values_make_no_long_errors() -> None:
    app = fakes.application(fakes.FakeEngine())
    long = "y" * 100_000
    for path, body in (
        ("/v1/completions", {"prompt": "x", "model": long}),
        ("/v1/completions", {"prompt": "x", long: 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": long}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": long, "content": "x"}]}),
        ("/v1/responses", {"input": [{"type": long}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": long}]}),
    ):
        error = error_of(fakes.call(app, "POST", path, json=body))
        assert len(error["message"]) <= 1000
        assert len(error["param"]) <= 256
    response = fakes.call(app, "GET", f"/v1/models/{long[:50_000]}")
    assert (response.status_code, len(error_of(response)["message"])) == (404, 1000)
    assert error_of(response)["message"].endswith("is not served; served are fake")


def test_every_router_is_known_here() -> None:
    posts = {route.path for router in ROUTERS for route in router.routes if "POST" in route.methods}
    assert posts == set(ROUTES)
