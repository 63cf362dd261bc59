"""Bodies of the allowed size, right and wrong, through a real server: `/health` answers meanwhile."""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from server.conftest import ServerProcess
from server.test_heavy_bodies import BODIES

pytestmark = pytest.mark.hostile
FULL = os.environ.get("HF_PAGED_FULL") == "1"
MOST = 0.1  # seconds that `/health` may take
AT_ONCE = 12


class Prober:
    """Asks for `/health` all the time, on a connection of its own; keeps how long it took."""

    def __init__(self, port: int) -> None:
        self.took: list[float] = []
        self.statuses: set[int] = set()
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.close()
        assert self.statuses == {200}

    def _run(self) -> None:
        while True:  # once at least
            began = time.monotonic()
            self._connection.request("GET", "/health")
            response = self._connection.getresponse()
            response.read()
            self.statuses.add(response.status)
            self.took.append(time.monotonic() - began)
            if self._stop.wait(0.005):
                return


def _post(port: int, path: str, content: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_no_body_stalls_the_server(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--no-spare-engine", "--disable-log-requests").wait_ready()
    calls = {name: (path, make().encode()) for name, (path, make, _, _) in BODIES.items()}
    worst: dict[str, float] = {}
    for name, (path, content) in calls.items():
        with Prober(server.port) as prober:
            status = _post(server.port, path, content)
        assert status in (200, 400), (name, status)
        worst[name] = max(prober.took)
    names = list(calls)
    with Prober(server.port) as prober, ThreadPoolExecutor(AT_ONCE) as threads:
        statuses = list(threads.map(lambda name: _post(server.port, *calls[name]), names))
    assert set(statuses) <= {200, 400, 429}
    worst[f"{AT_ONCE} at once"] = max(prober.took)
    for name, seconds in sorted(worst.items(), key=lambda item: -item[1])[:8]:
        print(f"{seconds * 1000:6.0f} ms  {name}")
    if FULL:  # else other things run on the machine
        assert max(worst.values()) < MOST
    assert server.stop() == 0
    assert "Traceback" not in server.text
