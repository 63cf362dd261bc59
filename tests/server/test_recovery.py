"""Engines that die under load: every stream goes on, and says what it would have said."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
import tiny
from server import load
from server.conftest import ServerProcess

from hf_paged import cli

# The issue's own size; `HF_PAGED_FULL=1 pytest tests/server` runs it.
FULL = os.environ.get("HF_PAGED_FULL") == "1"
STREAMS, KILLS = (100, 5) if FULL else (24, 2)


async def killed_under_load(server: ServerProcess, calls: list[dict], kills: int, replica: int | None) -> list:
    """Stream the calls, and kill an engine again and again while they run."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1

    async def kill() -> None:
        for number in range(kills):
            enough = seen + len(calls) // 2
            while seen < enough:
                await asyncio.sleep(0.01)
            pids = server.engine_pids
            os.kill(pids[-1] if replica is None else pids[replica], signal.SIGKILL)
            while number < kills - 1 and len(server.engine_pids) == len(pids):
                await asyncio.sleep(0.05)

    async with load.client(server.url) as http:
        streams = asyncio.gather(*(load.stream(http, body, count) for body in calls))
        killing = asyncio.create_task(kill())
        outcomes = await streams
        await killing
    return list(outcomes)


@pytest.mark.slow
def test_kill_9_again_and_again(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--max-num-seqs", "128").wait_ready()
    calls = load.bodies(STREAMS, longest=400)
    expected = asyncio.run(load.all_streams(server.url, calls))
    assert all(outcome.ok for outcome in expected)
    began = time.monotonic()
    outcomes = asyncio.run(killed_under_load(server, calls, KILLS, None))
    print(f"{STREAMS} streams, {KILLS} kills: {time.monotonic() - began:.1f} s")
    assert [outcome.error for outcome in outcomes] == [None] * STREAMS
    assert [outcome.tokens for outcome in outcomes] == [outcome.tokens for outcome in expected]
    assert [outcome.text for outcome in outcomes] == [outcome.text for outcome in expected]
    assert server.text.count("killed by signal 9") == KILLS
    assert server.stop() == 0


def test_engines_end_with_their_front(serve: Callable[..., ServerProcess]) -> None:
    """However the front ends, neither its engine nor the spare process is left behind; not even a stopped one."""
    server = serve().wait_ready()
    front = psutil.Process(server.process.pid)
    until = time.monotonic() + 120
    while len(front.children()) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    children = front.children()
    os.kill(server.engine_pids[0], signal.SIGSTOP)
    server.process.kill()
    gone, alive = psutil.wait_procs(children, timeout=120)
    assert (len(gone), alive) == (2, [])


def test_without_the_servers_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hf_paged.server.serve", "hf_paged.server.chat_client"):
        monkeypatch.setitem(sys.modules, name, None)
    for command in (["serve", "x"], ["chat", "x"]):
        assert cli.main(command) == 2
        assert "pip install '.[server]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are Linux's")
def test_an_engine_that_comes_while_there_are_no_descriptors(serve: Callable[..., ServerProcess]) -> None:
    """The front lives on (libzmq ends a process that has none left for a connection that it accepts), and serves."""
    server = serve("--no-spare-engine").wait_ready()
    front = psutil.Process(server.process.pid)
    before = resource.prlimit(front.pid, resource.RLIMIT_NOFILE)
    os.kill(server.engine_pids[0], signal.SIGKILL)
    until = time.monotonic() + 120
    while not (new := [child for child in front.children() if child.pid != server.engine_pids[0]]):
        assert time.monotonic() < until
        time.sleep(0.01)
    resource.prlimit(front.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    while new[0].is_running() and not any(c.laddr for c in new[0].net_connections("unix")):  # it has bound its sockets
        assert time.monotonic() < until
        time.sleep(0.1)
    time.sleep(1)
    resource.prlimit(front.pid, resource.RLIMIT_NOFILE, before)
    wait_for_health(server, 200)
    answered = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=120)
    assert answered.json()["usage"]["completion_tokens"] > 0
    assert server.stop() == 0


@pytest.mark.slow
def test_service_is_back_when_a_restart_can_succeed_again(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model")
    server = serve("--max-num-seqs", "4", model=model).wait_ready()
    weights = model / "model.safetensors"
    weights.rename(model / "away")
    os.kill(server.engine_pids[0], signal.SIGKILL)
    health = wait_for_health(server, 503)
    assert health.json()["status"].startswith("engine 0 can't be started: ")
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, timeout=30)
    assert (refused.status_code, "can't be started" in refused.text) == (503, True)
    assert httpx.get(f"{server.url}/ready", timeout=30).status_code == 503
    (model / "away").rename(weights)
    wait_for_health(server, 200)
    answered = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=60)
    assert answered.json()["usage"]["completion_tokens"] > 0
    assert server.stop() == 0


def wait_for_health(server: ServerProcess, status: int) -> httpx.Response:
    until = time.monotonic() + 120
    while (health := httpx.get(f"{server.url}/health", timeout=30)).status_code != status:
        assert time.monotonic() < until, f"still {health.status_code}: {server.text}"
        time.sleep(0.1)
    return health
