"""What can go wrong around a server and between it and its clients: each fault comes, lasts, and goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from server import load
from server.conftest import ServerProcess
from server.test_heavy_bodies import BODIES

INJECT = Path(__file__).parent / "inject"


class Faults:
    """Faults for one server.

    Args:
        server: it was started with `environment(folder)`.
        folder: of the injector and of the server's temporary files.
    """

    def __init__(self, server: ServerProcess, folder: Path, rng: random.Random) -> None:
        self.front = psutil.Process(server.process.pid)
        self._server = server
        self._folder = folder
        self._rng = rng
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def kinds(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """The faults, by name."""
        injected = {name: lambda name=name: self._injected(name) for name in ("open", "bind", "spawn", "fork", "send")}
        return injected | {
            "kill": self._kill,
            "kill while nothing can be spawned": self._kill_unspawnable,
            "stop": self._stop,
            "descriptors": lambda: self._limited(resource.RLIMIT_NOFILE, self.front.num_fds()),
            "full disk": lambda: self._limited(resource.RLIMIT_FSIZE, 0),
            "cleaner": self._clean,
            "poison": self._poison,
            "silent clients": self._silent,
            "clients that leave": self._leaving,
        }

    async def wait(self) -> None:
        """Until no client of a fault is there any more."""
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, AssertionError):
                raise ended

    # ------------------------------------------------------------------------------------------------ of the processes

    def engines(self) -> list[psutil.Process]:
        """The server's engine processes and the one that is kept at hand."""
        found = []
        for child in self.front.children():
            with contextlib.suppress(psutil.Error):
                if "hf_paged.server.worker" in child.cmdline():
                    found.append(child)
        return found

    async def _kill(self) -> None:
        found = self.engines()
        if found:
            with contextlib.suppress(psutil.Error):
                self._rng.choice(found).kill()

    async def _kill_unspawnable(self) -> None:
        with self._file("spawn"), self._file("bind"):
            for process in self.engines():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            await asyncio.sleep(2)

    async def _stop(self) -> None:
        stopped = self.engines()
        for process in stopped:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2)
        for process in stopped:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)

    async def _limited(self, kind: int, limit: int) -> None:
        before = resource.prlimit(self.front.pid, kind)
        resource.prlimit(self.front.pid, kind, (limit, before[1]))
        try:
            await asyncio.sleep(2)
        finally:
            resource.prlimit(self.front.pid, kind, before)

    async def _clean(self) -> None:
        for found in self._folder.glob("hf_paged-*"):
            shutil.rmtree(found, ignore_errors=True)
        await self._kill()

    async def _injected(self, name: str) -> None:
        with self._file(name):
            await asyncio.sleep(2)

    @contextlib.contextmanager
    def _file(self, name: str) -> Any:
        path = self._folder / name
        path.touch()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------------------- of the clients

    async def _poison(self) -> None:
        """Bodies that once held up the server or ended engines; each gets its answer."""
        name = self._rng.choice([*BODIES, *SCHEMAS])
        if name in SCHEMAS:
            body = {"prompt": "x", "max_tokens": 2, "structured_outputs": {"json": SCHEMAS[name]}}
            call = "/v1/completions", json.dumps(body).encode()
        else:
            path, make, _, _ = BODIES[name]
            call = path, make().encode()
        self._later(self._post(name, *call))
        await asyncio.sleep(1)

    async def _post(self, name: str, path: str, content: bytes) -> None:
        async with load.client(self._server.url) as http:
            with contextlib.suppress(httpx.TransportError):
                got = await http.post(path, content=content, headers={"Content-Type": "application/json"})
                assert got.status_code in (200, 400, 413, 429, 503), (name, got.text)

    async def _silent(self) -> None:
        """Clients that connect and say nothing, half a call, or a whole one whose answer they never read."""
        call = json.dumps({**load.bodies(1)[0], "stream": True, "n": 4, "max_tokens": 60, "temperature": 1}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        whole = head + b"Content-Length: %d\r\n\r\n" % len(call) + call
        for sent in [b"", head, whole[:-9], whole] * 10:
            self._later(self._hold(sent))
        await asyncio.sleep(2)

    async def _hold(self, sent: bytes) -> None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
            writer.write(sent)
            await asyncio.sleep(5)
            writer.transport.abort()

    async def _leaving(self) -> None:
        async with load.client(self._server.url) as http:
            calls = load.bodies(10, seed=self._rng.randrange(10**6))
            await asyncio.gather(*(load.stream(http, body, leave_after=self._rng.randrange(1, 9)) for body in calls))

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)


SCHEMAS: dict[str, Any] = {
    "an integer of more than 64 bits": {"type": "integer", "maximum": 2**64 - 1},
    "a pattern that is none": {"type": "string", "pattern": "("},
    "chained references": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(3000)} | {"a3000": {"type": "string"}},
    },
    "many alternatives": {"anyOf": [{"type": "string", "pattern": f"a{i}{{1,200}}"} for i in range(500)]},
}


def environment(folder: Path) -> dict[str, str]:
    """For a server whose calls to the system can be made to fail."""
    paths = [str(INJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "HF_PAGED_FAULTS": str(folder), "TMPDIR": str(folder)}


@contextlib.asynccontextmanager
async def every(seconds: float, faults: Faults, rng: random.Random) -> AsyncIterator[list[tuple[float, float, str]]]:
    """A fault every `seconds`. What is yielded grows: when each began, when it ended, and its name."""
    told: list[tuple[float, float, str]] = []
    loop = asyncio.get_running_loop()

    async def go_on() -> None:
        names: list[str] = []
        while True:
            if not names:  # each of them once, before one comes again
                names = rng.sample(list(faults.kinds), len(faults.kinds))
            name, began = names.pop(), loop.time()
            await faults.kinds[name]()
            told.append((began, loop.time(), name))
            await asyncio.sleep(max(0.0, began + seconds - loop.time()))

    task = asyncio.create_task(go_on())
    try:
        yield told
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
