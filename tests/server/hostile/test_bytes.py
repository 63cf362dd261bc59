"""Random bytes for every route: calls that are nearly right, and calls that are nothing at all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from server import load
from server.conftest import ServerProcess

pytestmark = pytest.mark.hostile
EACH = 1500 if os.environ.get("HF_PAGED_FULL") == "1" else 60  # calls for a route
MESSAGES = [{"role": "user", "content": "Hé"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SAMPLED = {"max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "seed": 1, "stop": ["x"], "logprobs": 1}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}, **SAMPLED},
        {"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 2, "structured_outputs": {"regex": "[ab]{2}"}},
    ],
    "/v1/chat/completions": [
        {"messages": MESSAGES, "tools": TOOLS, **SAMPLED, "logprobs": True},
        {"messages": MESSAGES, "max_tokens": 4, "response_format": {"type": "json_object"}, "logit_bias": {"5": 1}},
    ],
    "/v1/responses": [{"input": "x", "max_output_tokens": 3, "temperature": 0}],
    "/tokenize": [{"messages": MESSAGES}, {"prompt": "x"}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
}
HEADERS = (b"Host: localhost", b"Content-Type: application/json", b"Accept: */*", b"Connection: close")
SPLICES = (
    b"\x00", b"\xff\xfe", b"\r\n", b"\n\n", b'"', b"{", b"]]", b"null", b"1e999", b"-1", b"NaN", b"\\ud800",
    b"99999999999999999999", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"\xc3", b"%00", b"true,",
)  # fmt: skip


@pytest.fixture
def server(serve: Callable[..., ServerProcess]) -> ServerProcess:
    options = ("--max-num-seqs", "16", "--no-spare-engine", "--client-timeout", "0.5", "--disable-log-requests")
    return serve(*options, "--default-timeout", "20").wait_ready()


def test_random_bytes_break_nothing(server: ServerProcess) -> None:
    seed = int(os.environ.get("HF_PAGED_SEED", time.time_ns() % 10**6))
    print(f"HF_PAGED_SEED={seed}")
    rng = random.Random(seed)
    paths = httpx.get(server.url + "/openapi.json", timeout=60).json()["paths"]
    routes = [(method.upper(), path) for path, operations in paths.items() for method in operations]
    assert {path for _, path in routes} >= set(BODIES)
    statuses: dict[str, int] = {}
    for method, path in routes:
        for _ in range(EACH):
            call = _mutated(_call(method, path, rng), rng)
            answer = _sent(server.port, call)
            status = _checked(answer, call)
            statuses[status] = statuses.get(status, 0) + 1
    print(statuses)
    assert statuses["200"] > EACH  # of eleven routes
    assert httpx.get(server.url + "/health", timeout=60).status_code == 200
    assert load.until_idle(server.url)
    assert load.metrics(server.url, "hf_paged:engine_restarts_total") == 0
    assert server.stop() == 0
    assert "Traceback" not in server.text


def _call(method: str, path: str, rng: random.Random) -> bytes:
    """A right call, its body in one piece or in chunks."""
    body = json.dumps(rng.choice(BODIES[path])).encode() if path in BODIES else b""
    lines = [f"{method} {path.replace('{model}', 'tiny')} HTTP/1.1".encode(), *HEADERS]
    if body and rng.random() < 0.3:
        half = len(body) // 2
        lines.append(b"Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:])) + b"0\r\n\r\n"
    elif body:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _mutated(call: bytes, rng: random.Random) -> bytes:
    """With a few bytes changed: in its body alone, with the length told right, or anywhere."""
    head, _, body = call.partition(b"\r\n\r\n")
    if body and b"Content-Length" in head and rng.random() < 0.7:
        body = _spoilt(body, rng)
        head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head)
        return head + b"\r\n\r\n" + body
    return _spoilt(call, rng)


def _spoilt(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((0, 0, 1, 1, 4, 40)))
        repeated = data[at:end] * rng.choice((2, 50))
        piece = rng.choice((b"", rng.randbytes(rng.randrange(8)), rng.choice(SPLICES), repeated))
        data = data[:at] + piece + data[end:]
    return data


def _sent(port: int, call: bytes) -> bytes:
    """What comes back until the server closes; it waits no longer for the rest of a call than its client timeout."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client, contextlib.suppress(ConnectionError):
        client.sendall(call)
        while piece := client.recv(2**16):
            found += piece
            if _whole(found):
                break
    return found


def _whole(answer: bytes) -> bool:
    """Whether this is a whole answer, after which the server may keep the connection."""
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(end) and (len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n"))


def _checked(answer: bytes, call: bytes) -> str:
    """The status of an answer; it has one, and that says that the call was at fault, if anything was."""
    if not answer:  # dropped in the middle of a second call, which the bytes began
        return "none"
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert found, (call, answer)
    status = found[1].decode()
    assert status < "500", (call, answer)
    return status
