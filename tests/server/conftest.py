"""Servers to test: processes of their own, as users start them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny

STARTS_WITHIN = 120.0


class ServerProcess:
    """A running `hf-paged serve`; its log is kept in a file."""

    def __init__(self, model: Path, log: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        command = [sys.executable, "-m", "hf_paged.server", str(model), "--port", "0", *arguments]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
            )
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_listening(self) -> None:
        self._until(lambda: self._find(r"listening on \S+ port (\d+)"))

    def wait_ready(self) -> ServerProcess:
        self.wait_listening()
        self._until(lambda: self._get("/ready") == 200)
        return self

    def _until(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + STARTS_WITHIN
        while not done():
            assert self.process.poll() is None, f"the server ended: {self.text}"
            assert time.monotonic() < until, f"the server is late: {self.text}"
            time.sleep(0.05)

    def _find(self, pattern: str) -> bool:
        found = re.search(pattern, self.text)
        if found:
            self.port = int(found[1])
        return bool(found)

    def _get(self, path: str) -> int:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + path, timeout=30).status_code
        return 0

    @property
    def text(self) -> str:
        return self.log.read_text()

    def logged(self, pattern: str, times: int = 1) -> list[str]:
        """The log's lines that `pattern` is found in, once there are `times`: they may follow an answer."""
        self._until(lambda: len(self._lines(pattern)) >= times)
        return self._lines(pattern)

    def _lines(self, pattern: str) -> list[str]:
        return [line for line in self.text.splitlines() if re.search(pattern, line)]

    @property
    def engine_pids(self) -> list[int]:
        """Of the engines that became ready, in the order in which they did."""
        return [int(pid) for pid in re.findall(r"engine \d+ is ready.* pid=(\d+)", self.text)]

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """End it; its exit status."""
        if self.process.poll() is None:
            self.signal()
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that tests share; none of them harms it."""
    log = tmp_path_factory.mktemp("server") / "log"
    server = ServerProcess(tiny_model, log, "--served-model-name", "tiny", "--max-num-seqs", "64", "--no-spare-engine")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def serve(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of the test's own."""
    started: list[ServerProcess] = []

    def start(*arguments: str, model: Path = tiny_model, env: dict[str, str] | None = None) -> ServerProcess:
        log = tmp_path / f"log-{len(started)}"
        started.append(ServerProcess(model, log, "--served-model-name", "tiny", *arguments, env=env))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def events(text: str) -> list[Any]:
    """The data of server-sent events, but for [DONE]."""
    data = re.findall(r"^data: (.*)$", text, re.MULTILINE)
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]
