"""One engine process, from its start to its death. A replica has one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Callable

import zmq

from hf_paged.server.config import ServerConfig
from hf_paged.server.front.sockets import Sockets
from hf_paged.server.messages import FromEngine, Hello, Stop, ToEngine, decode_from_engine, encode

logger = logging.getLogger(__name__)

GRACE = 0.05
DESCRIPTORS = 16  # upper bound on the descriptors that starting a process needs


async def spawn() -> asyncio.subprocess.Process:
    """An engine process that waits for its orders. A session of its own: Ctrl-C is the front's to act on.

    Raises:
        OSError: the system has no room for it.
    """
    _check_descriptors()
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hf_paged.server.worker", stdin=asyncio.subprocess.PIPE, start_new_session=True
    )


def _check_descriptors() -> None:
    """Raise where there are too few for a new process: uvloop would keep for good what it had opened until then."""
    with contextlib.ExitStack() as opened:
        for _ in range(DESCRIPTORS):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))


class Spares:
    """Keeps one process at hand that has imported everything and waits for its orders.

    Importing torch and Transformers takes many seconds, which a restart then doesn't need.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._spare: asyncio.subprocess.Process | None = None
        self._failing = False  # the last attempt failed and was logged
        self._making = asyncio.Lock()

    async def take(self) -> asyncio.subprocess.Process:
        """The spare, or else a new process."""
        async with self._making:
            spare, self._spare = self._spare, None
        if spare is not None and spare.returncode is None:
            return spare
        return await spawn()

    async def prepare(self) -> None:
        """Have a spare; called again and again while there is time for it."""
        async with self._making:
            if self._enabled and (self._spare is None or self._spare.returncode is not None):
                try:
                    self._spare = await spawn()
                    self._failing = False
                except Exception:
                    if not self._failing:
                        logger.exception("no spare process can be started; the next restart takes longer")
                    self._failing = True

    async def close(self) -> None:
        """End the spare."""
        self._enabled = False
        async with self._making:
            spare, self._spare = self._spare, None
        if spare is not None and spare.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                spare.kill()
            await spare.wait()


class EngineProcess:
    """A running engine process and the two sockets to it.

    Args:
        sockets: where the sockets to it are made. The engine process binds them, and this one connects to them: libzmq
            ends a process that has no descriptor left when another one connects to it, and tries again where a
            connection can't be made.
        spares: where the process comes from.
        on_message: called in the event loop with each message.

    Attributes:
        pid: of the process, once it was started.
    """

    def __init__(self, sockets: Sockets, spares: Spares, on_message: Callable[[FromEngine], None]) -> None:
        self._sockets, self._spares = sockets, spares
        self._addresses: list[str] = []
        self._to = sockets.plain.socket(zmq.PUSH)
        self._from = sockets.context.socket(zmq.PULL)
        self._on_message = on_message
        self._process: asyncio.subprocess.Process | None = None
        self.pid: int | None = None
        try:
            for socket in (self._to, self._from):
                address = sockets.address()
                self._addresses.append(address)
                socket.setsockopt(zmq.SNDHWM, 0)  # no limit: the front's admission bounds the messages
                socket.setsockopt(zmq.RCVHWM, 0)
                socket.connect(address)  # zmq connects once the other end has bound it
            self._to.send(encode(Hello()))
        except BaseException:
            self._close()
            raise

    async def run(self, config: ServerConfig, replica: int) -> int:
        """Start it, hand on its messages, and return its exit status when it is dead. Cancelled: it is killed.

        Raises:
            OSError: no process can be started.
        """
        from hf_paged.server.worker import Orders

        inbox, outbox = self._addresses
        orders = Orders(replica, config.replicas, inbox, outbox, config)
        try:
            process = self._process = await self._spares.take()
            self.pid = process.pid
            return await self._attend(process, orders)
        finally:
            self.kill()
            if self._process is not None:
                await self._process.wait()
            self._close()

    async def _attend(self, process: asyncio.subprocess.Process, orders: object) -> int:
        reader = asyncio.create_task(self._read())
        try:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):  # already dead: its exit status says so
                process.stdin.write(pickle.dumps(orders))
                await process.stdin.drain()
            status = await process.wait()
            await asyncio.sleep(GRACE)  # its last messages may still be in transit
            return status
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    def _close(self) -> None:
        self._to.close(linger=0)
        self._from.close(linger=0)
        for address in self._addresses:
            self._sockets.discard(address)

    def send(self, message: ToEngine) -> bool:
        """Queue a message; never waits. Whether it was queued; one to a process that is dead is lost.

        A process that can't be told something would never answer it: it is ended, and another one is told.
        """
        if self._to.closed:
            return False
        try:
            self._to.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.error("the engine process %s can't be sent messages (%s), and is killed", self.pid, error)
            self.kill()
            return False
        return True

    def stop(self) -> None:
        """Ask it to end."""
        self.send(Stop())

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _read(self) -> None:
        while True:
            self._take(await self._from.recv())

    def _take(self, packed: bytes) -> None:
        try:
            self._on_message(decode_from_engine(packed))
        except Exception:
            logger.exception("a message from the engine process %s could not be handled", self.pid)
