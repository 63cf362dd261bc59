"""A thousand slow connections, and what others notice of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import statistics
import time
from collections.abc import Callable

import psutil
import pytest
from server import load
from server.conftest import ServerProcess

pytestmark = pytest.mark.hostile
FULL = os.environ.get("HF_PAGED_FULL") == "1"
CONNECTIONS = 1000
SECONDS = 60.0 if FULL else 15.0
MEMORY = 100 * 2**20
BODY = {**load.bodies(1)[0], "max_tokens": 40}


def test_a_thousand_slow_connections(serve: Callable[..., ServerProcess]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * CONNECTIONS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4 * CONNECTIONS, hard), hard))
    server = serve("--client-timeout", "120", "--no-spare-engine", "--disable-log-requests").wait_ready()
    asyncio.run(_measure(server))
    assert load.until_idle(server.url)
    assert server.stop() == 0


async def _measure(server: ServerProcess) -> None:
    front = psutil.Process(server.process.pid)
    await _latencies(server, 3.0)
    alone = await _latencies(server, SECONDS / 4)
    memory = front.memory_info().rss
    slow = [asyncio.create_task(_slow(server.port, number)) for number in range(CONNECTIONS)]
    while _established(front, server.port) < CONNECTIONS:
        assert not any(task.done() for task in slow), "a connection can't be made, or is closed"
        await asyncio.sleep(0.2)
    among = await _latencies(server, SECONDS)
    grown = front.memory_info().rss - memory
    assert _established(front, server.port) >= CONNECTIONS, "some were closed before their time"
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    after = await _latencies(server, SECONDS / 4)
    undisturbed, disturbed = statistics.median(alone + after), statistics.median(among)
    print(
        f"a call among {CONNECTIONS} slow connections: {disturbed * 1000:.1f} ms; without: {undisturbed * 1000:.1f} ms"
    )
    print(f"ratio {disturbed / undisturbed:.2f}; memory +{grown / 2**20:.1f} MiB")
    assert grown < MEMORY
    if FULL:  # else other things run on the machine
        assert disturbed < 1.2 * undisturbed


async def _slow(port: int, number: int) -> None:
    """Says nothing, or sends a byte of a header or of a body each few seconds."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    body = json.dumps(BODY).encode()
    of_body = head + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    sent = (b"", head + b"X-Long: ", of_body)[number % 3]
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        while True:
            await asyncio.sleep(2 + number % 3)
            if sent:
                writer.write(b"0")
    finally:
        writer.transport.abort()


async def _latencies(server: ServerProcess, seconds: float) -> list[float]:
    """Of calls one after the other."""
    found: list[float] = []
    until = time.monotonic() + seconds
    async with load.client(server.url) as http:
        while time.monotonic() < until:
            outcome = await load.stream(http, BODY)
            assert outcome.ok, outcome
            found.append(outcome.times[-1] - outcome.times[0])
    return found


def _established(front: psutil.Process, port: int) -> int:
    with contextlib.suppress(psutil.Error):
        return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in front.net_connections("tcp"))
    return 0
