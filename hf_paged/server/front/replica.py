"""A replica: one engine process after the other, with a pause before the next that grows while they die young."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from hf_paged.server.config import ServerConfig
from hf_paged.server.front.process import EngineProcess, Spares
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.front.sockets import Sockets
from hf_paged.server.messages import Abort, Delta, Deltas, EngineStats, Failed, FromEngine, Ready, ToEngine

logger = logging.getLogger("hf_paged.server")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
YOUNG = 30.0  # seconds; an engine that was ready for less, and finished no request, died young
LOST = 10  # first starts in a row that failed, after which a replica counts as lost


class Owner(Protocol):
    """What a replica tells."""

    def replica_ready(self, replica: Replica, ready: Ready) -> None:
        """It takes requests."""

    def replica_died(self, replica: Replica, sequences: list[Sequence], why: str) -> None:
        """Its process is gone; these were on it."""

    def replica_brought(self, replica: Replica, delta: Delta) -> None:
        """Something of a request."""

    def replica_reported(self, replica: Replica, stats: EngineStats) -> None:
        """How it is doing."""


class Replica:
    """One engine, over all the processes that it takes.

    Attributes:
        index: which one it is.
        state: starting (never ready yet), ready, restarting, stopped.
        room: sequences that it is handed at a time.
        sequences: those that it has, by name.
        probe: a sequence that came from a dead engine and has to prove itself before any other is handed over.
        why: how its last process ended; empty: none has.
        failure: why it can't be started, once it is clear that trying again is of no use.
    """

    def __init__(self, index: int, config: ServerConfig, sockets: Sockets, spares: Spares, owner: Owner) -> None:
        self._spares = spares
        self.index = index
        self.state = "starting"
        self.room = config.paged.max_num_seqs + max(1, config.paged.max_num_seqs // 8)
        self.sequences: dict[str, Sequence] = {}
        self.probe: Sequence | None = None
        self.failure: Failed | None = None
        self._config = config
        self._sockets = sockets
        self._owner = owner
        self._process: EngineProcess | None = None
        self._ready_since: float | None = None
        self._served = False  # whether its process has finished a request
        self._deaths = 0  # in a row, of engines that were young
        self._failed_starts = 0  # in a row, of engines that never were ready
        self._progress = time.monotonic()
        self._num_steps = -1
        self.why = self._why = ""
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Of its process, or None."""
        return None if self._process is None else self._process.pid

    @property
    def load(self) -> int:
        """Tokens that are still to be computed for what it has."""
        return sum(sequence.expected for sequence in self.sequences.values())

    @property
    def lost(self) -> bool:
        """Whether what it is handed may never be answered: it has given up, or it was ready once and can't be again."""
        failed = self._failed_starts >= (LOST if self.state == "starting" else 1)
        return self.failure is not None or self.state == "stopped" or failed

    def stalled(self) -> float:
        """Seconds without progress, though it has work."""
        if self.state != "ready" or not self.sequences:
            self._progress = time.monotonic()
        return time.monotonic() - self._progress

    # ------------------------------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Keep a process running until cancelled, or until starting one is of no use.

        An error here counts as a death of the process: it is logged, and the next try follows after a pause.
        """
        try:
            while self.failure is None and not self._stopping:
                await self._live_once()
                if self.failure is None and not self._stopping:
                    await asyncio.sleep(self.pause)
        finally:
            self.state = "stopped"

    async def _live_once(self) -> None:
        self._ready_since, self._served, self._why = None, False, ""
        try:
            ended = _describe(await self._run_process())
        except Exception as error:
            logger.exception("engine %d: its process can't be started or attended", self.index)
            ended = f"{type(error).__name__}: {error}"
        self.why = why = self._why or ended
        age = time.monotonic() - self._ready_since if self._ready_since is not None else 0.0
        was_ready = self._ready_since is not None
        self._deaths = 0 if self._served or age >= YOUNG else self._deaths + 1
        self._failed_starts += not was_ready
        self.state = "restarting" if self.state != "starting" or was_ready else "starting"
        sequences, self.sequences, self.probe = list(self.sequences.values()), {}, None
        if self._stopping:
            return
        resumed = f"{len(sequences)} requests will be resumed"
        logger.error("engine %d died (%s); %s", self.index, why, resumed, extra={"pid": self.pid})
        self._owner.replica_died(self, sequences, why)

    async def _run_process(self) -> int:
        """The exit status of a new process, once it is dead; one that isn't ready in time is killed."""
        self._process = EngineProcess(self._sockets, self._spares, self._take)
        deadline = asyncio.get_running_loop().call_later(self._config.startup_timeout, self._check_started)
        try:
            return await self._process.run(self._config, self.index)
        finally:
            deadline.cancel()

    def _check_started(self) -> None:
        if self._ready_since is None:
            self.kill(f"it wasn't ready within startup_timeout={self._config.startup_timeout:g} s")

    @property
    def pause(self) -> float:
        """Seconds before the next process is started: none after the first death, then ever longer."""
        if self._deaths <= 1:
            return 0.0
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._deaths - 2))

    def kill(self, why: str) -> None:
        """End the process at once; another one follows."""
        self._why = why
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Ask the process to end; no other follows."""
        self._stopping = True
        if self._process is not None:
            self._process.stop()

    # --------------------------------------------------------------------------------------------------------- requests

    def place(self, sequence: Sequence) -> None:
        """Hand it a sequence."""
        sequence.placed_on(self.index)
        if sequence.returning:
            self.probe = sequence
        self.sequences[sequence.name] = sequence
        if not self.send(sequence.message()):
            sequence.fresh = False  # the process did not get it, so its death is not this sequence's fault

    def forget(self, sequence: Sequence, *, abort: bool) -> None:
        """It is done with a sequence; `abort`: and has to be told so."""
        if self.sequences.pop(sequence.name, None) is None:
            return
        if self.probe is sequence:
            self.probe = None
        if abort:
            self.send(Abort([sequence.name]))

    def send(self, message: ToEngine) -> bool:
        """Tell the process something; whether that was possible."""
        return self._process is not None and self._process.send(message)

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Deltas):
            self._progress = time.monotonic()
            for delta in message.deltas:
                self._served = self._served or delta.finish in ("stop", "length")
                self._owner.replica_brought(self, delta)
        elif isinstance(message, EngineStats):
            if message.num_steps != self._num_steps or not message.busy:
                self._progress = time.monotonic()
            self._num_steps = message.num_steps
            self._owner.replica_reported(self, message)
        elif isinstance(message, Ready):
            self._ready_since = self._progress = time.monotonic()
            self._failed_starts = 0
            self.state = "ready"
            logger.info("engine %d is ready", self.index, extra={"pid": message.pid, "backend": message.backend})
            self._owner.replica_ready(self, message)
        elif isinstance(message, Failed):
            self._why = message.message
            if self.state == "starting":
                self.failure = message


def _describe(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
