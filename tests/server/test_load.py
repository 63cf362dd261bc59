"""Many clients, some of whom hang up; more than the server has room for; a replica that dies."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
from server import load
from server.conftest import ServerProcess
from server.test_recovery import killed_under_load

# The issue's own size; `HF_PAGED_FULL=1 pytest tests/server` runs it.
FULL = os.environ.get("HF_PAGED_FULL") == "1"
CLIENTS, ROUNDS = (500, 4) if FULL else (100, 2)


async def crowd(server: ServerProcess, calls: list[dict[str, Any]], leaving: dict[int, int]) -> tuple[list, float]:
    """Stream all calls at once; some leave. The outcomes, and the slowest answer of /health meanwhile."""
    slowest = 0.0
    async with load.client(server.url) as http, httpx.AsyncClient(timeout=30) as prober:

        async def probe() -> None:
            nonlocal slowest
            while True:
                began = time.monotonic()
                assert (await prober.get(server.url + "/health")).status_code == 200
                slowest = max(slowest, time.monotonic() - began)
                await asyncio.sleep(0.1)

        probing = asyncio.create_task(probe())
        streams = (load.stream(http, body, leave_after=leaving.get(i, 0)) for i, body in enumerate(calls))
        outcomes = list(await asyncio.gather(*streams))
        probing.cancel()
    return outcomes, slowest


def test_many_clients_some_hang_up(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--max-num-seqs", "64", "--no-spare-engine", "--disable-log-requests").wait_ready()
    calls = load.bodies(CLIENTS, longest=64)
    alone, _ = asyncio.run(crowd(server, calls[:8], {}))
    rng, memory = random.Random(0), []
    answers: dict[int, list[int]] = {}
    processes = [psutil.Process(server.process.pid), psutil.Process(server.engine_pids[0])]
    for _ in range(ROUNDS):
        leaving = {i: rng.randrange(1, 16) for i in rng.sample(range(CLIENTS), CLIENTS // 10)}
        outcomes, slowest = asyncio.run(crowd(server, calls, leaving))
        memory.append(sum(process.memory_info().rss for process in processes))
        assert slowest < 1.0
        for i, outcome in enumerate(outcomes):
            if i not in leaving:
                assert outcome.ok
                assert len(outcome.tokens) == calls[i]["max_tokens"]
                assert answers.setdefault(i, outcome.tokens) == outcome.tokens
        assert [outcome.tokens for outcome in alone] == [answers.get(i, alone[i].tokens) for i in range(8)]
        print(f"{CLIENTS} clients: /health at most {slowest:.3f} s, {memory[-1] / 2**20:.0f} MiB")
    assert load.until_idle(server.url)
    assert memory[-1] < 1.1 * memory[0]


def test_overload(serve: Callable[..., ServerProcess]) -> None:
    """At ten times what it has room for: what is accepted is hardly slower, the rest is refused at once."""
    limits = ("--max-num-seqs", "8", "--max-queue-requests", "2", "--no-spare-engine", "--disable-log-requests")
    server = serve(*limits).wait_ready()
    body = {**load.bodies(1)[0], "max_tokens": 200}

    async def burst(count: int) -> list[load.Outcome]:
        async with load.client(server.url) as http:
            calls = [{**body, "prompt": [i % 200 + 3, *body["prompt"]]} for i in range(count)]
            return list(await asyncio.gather(*(load.stream(http, call) for call in calls)))

    asyncio.run(burst(8))
    unloaded = statistics.median(_latencies(asyncio.run(burst(8))))
    outcomes = asyncio.run(burst(80))
    accepted = [outcome for outcome in outcomes if outcome.ok]
    refused = [outcome for outcome in outcomes if not outcome.ok]
    assert {outcome.status for outcome in refused} == {429}
    assert 8 <= len(accepted) <= 11
    slow = statistics.median(_latencies(accepted))
    print(f"unloaded {unloaded:.3f} s, {len(accepted)} accepted at ten times the load {slow:.3f} s")
    assert slow < 2 * unloaded + 0.2
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200


def _latencies(outcomes: list[load.Outcome]) -> list[float]:
    return [outcome.times[-1] - outcome.times[0] for outcome in outcomes]


def test_one_of_two_replicas_dies(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--replicas", "2", "--max-num-seqs", "64", "--disable-log-requests")
    server.wait_ready()
    while len(server.engine_pids) < 2:
        time.sleep(0.1)
    calls = load.bodies(100 if FULL else 24, longest=400)
    expected = asyncio.run(load.all_streams(server.url, calls))
    outcomes = asyncio.run(killed_under_load(server, calls, 1, replica=0))
    assert [outcome.error for outcome in outcomes] == [None] * len(calls)
    assert [outcome.tokens for outcome in outcomes] == [outcome.tokens for outcome in expected]
    assert server.text.count("killed by signal 9") == 1
    assert server.stop() == 0
