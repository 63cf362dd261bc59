"""Traffic of honest clients while faults come and go: all are answered right, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server import load
from server.conftest import ServerProcess
from server.hostile import faults as hostile
from server.hostile.faults import Faults

pytestmark = pytest.mark.hostile
FULL = os.environ.get("HF_PAGED_FULL") == "1"
SECONDS = 600.0 if FULL else 75.0
EVERY = 5.0
CLIENTS = 8
CALLS = 32
MEMORY = 150 * 2**20  # bytes that the front may have kept


@dataclasses.dataclass
class Served:
    """A call of an honest client: which one, when it began and ended, and what it had to try again for."""

    number: int
    began: float
    ended: float
    refusals: list[str]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: it has to be one for sockets."""
    made = Path(tempfile.mkdtemp(prefix="hostile-"))
    yield made
    shutil.rmtree(made)


def test_honest_clients_are_served_whatever_goes_wrong(serve: Callable[..., ServerProcess], folder: Path) -> None:
    seed = int(os.environ.get("HF_PAGED_SEED", time.time_ns() % 10**6))
    print(f"HF_PAGED_SEED={seed}")
    options = ("--max-num-seqs", "16", "--client-timeout", "3", "--watchdog", "20", "--disable-log-requests")
    server = serve(*options, env=hostile.environment(folder)).wait_ready()
    try:
        asyncio.run(asyncio.wait_for(_traffic(server, folder, random.Random(seed)), SECONDS + 300))
    except BaseException:
        print(server.text[-20_000:])
        raise
    assert server.stop() == 0
    assert not list(folder.glob("hf_paged-*"))


async def _traffic(server: ServerProcess, folder: Path, rng: random.Random) -> None:
    calls = load.bodies(CALLS, longest=120)
    faults = Faults(server, folder, rng)
    expected = await load.all_streams(server.url, calls)
    assert all(outcome.ok for outcome in expected)
    undisturbed = await _clients(server, calls, expected, rng, 15.0)
    slowest = {n: max(c.ended - c.began for c in undisturbed if c.number == n) for n in {c.number for c in undisturbed}}
    restart = await _warm(server, faults)
    before = _held(faults)
    async with hostile.every(EVERY, faults, rng) as told, _health(server) as health:
        served = await _clients(server, calls, expected, rng, SECONDS)
    await faults.wait()
    _report(served, slowest, restart, told, health)
    await asyncio.to_thread(_until, lambda: _status(server, "/ready") == 200, "ready again")
    assert await asyncio.to_thread(load.until_idle, server.url), "something is still held"
    await asyncio.to_thread(_until, lambda: _none_left(before, _held(faults)), lambda: f"{before} {_held(faults)}")
    assert len(served) >= CLIENTS
    again = await load.all_streams(server.url, calls)
    assert [outcome.tokens for outcome in again] == [outcome.tokens for outcome in expected]


async def _clients(
    server: ServerProcess, calls: list[Any], expected: list[load.Outcome], rng: random.Random, last: float
) -> list[Served]:
    """Honest clients for `last` seconds, one call after the other."""
    served: list[Served] = []
    until = time.monotonic() + last

    async def client() -> None:
        while time.monotonic() < until:
            number = rng.randrange(len(calls))
            served.append(await _honest(server, number, calls[number], expected[number]))
            await asyncio.sleep(rng.random() * 0.2)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return served


async def _honest(server: ServerProcess, number: int, body: dict[str, Any], expected: load.Outcome) -> Served:
    """One call. What is refused is sent again, as clients do; what is accepted has to be answered, and right."""
    began, refusals = time.monotonic(), []
    while True:
        async with load.client(server.url) as http:
            outcome = await load.stream(http, body)
        if outcome.ok:
            assert (outcome.tokens, outcome.text) == (expected.tokens, expected.text), f"call {number} has other tokens"
            return Served(number, began, time.monotonic(), refusals)
        accepted = outcome.status == 200
        assert not accepted, f"call {number} was accepted, and then: {outcome.error}"
        assert outcome.status in (0, 429, 503), f"call {number}: {outcome.status} {outcome.error}"
        refusals.append(f"{outcome.status or outcome.error}")
        assert len(refusals) < 2000, refusals[-5:]
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _health(server: ServerProcess) -> Any:
    """Asks all the time; yields lists of (when, seconds, /health, /ready)."""
    seen: list[tuple[float, float, int, int]] = []

    async def ask() -> None:
        while True:
            began = time.monotonic()
            health = await asyncio.to_thread(_status, server, "/health")
            took = time.monotonic() - began
            seen.append((began, took, health, await asyncio.to_thread(_status, server, "/ready")))
            await asyncio.sleep(0.1)

    task = asyncio.create_task(ask())
    try:
        yield seen
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _status(server: ServerProcess, path: str) -> int:
    try:
        return httpx.get(server.url + path, timeout=30).status_code
    except httpx.TransportError:
        return 0


def _until(true: Callable[[], bool], what: str | Callable[[], str]) -> None:
    until = time.monotonic() + 120
    while not true():
        assert time.monotonic() < until, what if isinstance(what, str) else what()
        time.sleep(0.2)


async def _warm(server: ServerProcess, faults: Faults) -> float:
    """Have every pool of threads used, and buffers grown, before anything is counted; the seconds of a restart."""
    for name in ("poison", "silent clients", "clients that leave"):
        for _ in range(8 if name == "poison" else 1):
            await faults.kinds[name]()
    await faults.wait()
    began = time.monotonic()
    for process in faults.engines():
        process.kill()
    await asyncio.to_thread(_until, lambda: _status(server, "/ready") != 200, "seen to be gone")
    await asyncio.to_thread(_until, lambda: _status(server, "/ready") == 200, "ready again")
    restart = time.monotonic() - began
    await asyncio.to_thread(_until, lambda: len(faults.engines()) == 2, "one at hand again")
    return restart


def _held(faults: Faults) -> dict[str, int]:
    """What the front has of the system."""
    front = faults.front
    return {
        "descriptors": front.num_fds(),
        "threads": front.num_threads(),
        "memory": front.memory_info().rss,
        "engines": len(faults.engines()),
        "children": len(front.children(recursive=True)),
        "sockets": sum(connection.status == psutil.CONN_ESTABLISHED for connection in front.net_connections("tcp")),
    }


def _none_left(before: dict[str, int], now: dict[str, int]) -> bool:
    """Whether it is back to what it was.

    Threads of pools are made when they are first needed, and connections of the prober's come and go.
    """
    slack = {"memory": MEMORY, "descriptors": 3, "threads": 4, "sockets": 2}
    return now["engines"] == before["engines"] and all(now[name] <= before[name] + slack.get(name, 0) for name in now)


def _report(
    served: list[Served],
    slowest: dict[int, float],
    restart: float,
    told: list[tuple[float, float, str]],
    health: list[tuple[float, float, int, int]],
) -> None:
    """Print the figures; in the long form also judge how long anybody waited."""
    waits = sorted(call.ended - call.began for call in served)
    down = [when for when, _, _, ready in health if ready != 200]
    probes = sorted(took for _, took, _, _ in health)
    excess = max(_excess(call, slowest, told, down) for call in served)
    refusals = Counter(refusal[:60] for call in served for refusal in call.refusals)
    print(f"{len(served)} calls served; {len(told)} faults: {dict(Counter(name for *_, name in told))}")
    print(f"refused and sent again: {dict(refusals)}; not ready for {len(down)} of {len(health)} probes")
    print(
        f"waited {_median(waits):.2f} s (median), {waits[-1]:.2f} s at most; undisturbed {max(slowest.values()):.2f} s"
    )
    print(f"/health within {_median(probes) * 1000:.0f} ms (median), {probes[-1] * 1000:.0f} ms at most")
    print(f"beyond twice the undisturbed time, outages and faults: {excess:.2f} s at most; a restart: {restart:.2f} s")
    if FULL:  # else other things run on the machine
        assert excess < restart


def _excess(call: Served, slowest: dict[int, float], told: list[tuple[float, float, str]], down: list[float]) -> float:
    """Seconds beyond twice the undisturbed time, without those in which a fault lasted or no engine was ready."""
    step, waited = 0.1, 0.0
    when = call.began
    while when < call.ended:
        faulty = any(start <= when <= end for start, end, _ in told)
        waited += 0.0 if faulty or any(abs(when - at) < 0.3 for at in down) else step
        when += step
    return waited - 2 * slowest.get(call.number, max(slowest.values()))


def _median(values: list[float]) -> float:
    return values[len(values) // 2]
