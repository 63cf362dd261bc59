"""Fleet: the replicas behind one queue. It holds every request, so that none is lost with the engine that it is on."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import itertools
import logging
import time
from collections import abc

from hf_paged.engine.scheduler import turn
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, invalid
from hf_paged.server.front.process import Spares
from hf_paged.server.front.replica import Replica
from hf_paged.server.front.router import Router
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.front.sockets import Sockets, sweep
from hf_paged.server.messages import Delta, EngineStats, Ready, WatchBlocks
from hf_paged.server.pace import Pace, bounded
from hf_paged.server.stats import ServerStats

logger = logging.getLogger("hf_paged.server")

KILLS = 2  # engine deaths after which the request that causes them is given up


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """How an engine is doing.

    Attributes:
        ready: whether it takes requests now.
        alive: whether it makes progress, or will again.
        why: if one of them isn't so, the reason.
        waiting, waiting_tokens: requests that have no token yet, and what they are about to compute.
        running: requests that have one.
        replicas: for each one its state: starting, ready, restarting, stopped.
    """

    ready: bool
    alive: bool
    why: str
    waiting: int
    waiting_tokens: int
    running: int
    replicas: tuple[str, ...]


class Fleet:
    """All engines, as one. Used in the event loop alone; routes and tests know no more of it than its public methods.

    A sequence waits in the queue until a replica has room for it; the replicas' own queues stay short, so that what
    waits can still go anywhere. When an engine dies, its sequences go back to the queue's front, and each replica is
    handed one of them at a time: the next one follows when it has brought a token. So an engine that dies again shows
    which request it died of, and that one alone is given up.

    Args:
        config: the server's options.
        stats: told what happens.
    """

    def __init__(self, config: ServerConfig, stats: ServerStats) -> None:
        self.info: Ready | None = None
        self._config = config
        self._stats = stats
        self._sockets = Sockets()
        self._spares = Spares(config.spare_engine)
        self._replicas = [Replica(i, config, self._sockets, self._spares, self) for i in range(config.replicas)]
        self._router = Router()
        self._held: dict[Sequence, None] = {}  # all that have not ended, the oldest first
        self._queue: list[Sequence] = []  # of these, those never placed; by sort key
        self._returning: list[Sequence] = []  # and those from dead engines; suspects last
        self._order = itertools.count()
        self._queued_tokens = 0
        self._pace = Pace()  # of sequences that end
        self._began = time.monotonic()
        self._loading: float | None = None  # seconds that the first engine took to be ready
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        stats.on_watch = self._watch

    # ------------------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Start the engine processes; needs a running event loop."""
        sweep()
        self._began = time.monotonic()
        self._tasks = [asyncio.create_task(replica.run()) for replica in self._replicas]
        self._tasks.append(asyncio.create_task(self._watchdog()))

    async def wait_ready(self) -> None:
        """Return when the first replica takes requests.

        Raises:
            APIError: none of them can be started; the message says why.
        """
        while self.info is None:
            if all(replica.failure is not None for replica in self._replicas):
                failure = self._replicas[0].failure
                assert failure is not None
                raise APIError(503, failure.message, code="usage" if failure.usage else "engine")
            await asyncio.sleep(0.02)

    def abort_all(self) -> None:
        """End every sequence, and take no more."""
        self._closed = True
        for sequence in list(self._held):
            self.abort(sequence)

    async def close(self) -> None:
        """End everything, processes too. Sequences that have not ended end with abort."""
        self.abort_all()
        for replica in self._replicas:
            replica.stop()
        await asyncio.wait(self._tasks[: len(self._replicas)], timeout=0.5)
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._spares.close()
        self._sockets.close()

    def snapshot(self) -> Snapshot:
        """How the engines are doing."""
        ready = any(replica.state == "ready" for replica in self._replicas)
        hung = [replica for replica in self._replicas if replica.stalled() > self._config.watchdog]
        lost = [replica for replica in self._replicas if replica.lost]
        alive = len({*hung, *lost}) < len(self._replicas)
        why = "ok"
        if not alive:
            why = f"no step for {hung[0].stalled():.0f} s" if hung else _unstartable(lost[0])
        elif not ready:
            why = self._replicas[0].state
        states = tuple("hung" if replica in hung else replica.state for replica in self._replicas)
        return Snapshot(
            ready=ready and alive,
            alive=alive,
            why=why,
            waiting=len(self._queue) + len(self._returning),
            waiting_tokens=self._queued_tokens,
            running=sum(len(replica.sequences) for replica in self._replicas),
            replicas=states,
        )

    async def _watchdog(self) -> None:
        """An engine that hangs fails the liveness probe; left alone for as long again, it is killed and replaced.

        While all engines are well, a spare process is kept.
        """
        pause = min(1.0, self._config.watchdog / 4)
        while True:
            await asyncio.sleep(pause)
            for replica in self._replicas:
                try:
                    self._check_progress(replica)
                except Exception:  # keep watching the others
                    logger.exception("engine %d can't be watched", replica.index)
            if all(replica.state in ("ready", "stopped") for replica in self._replicas):
                await self._spares.prepare()

    def _check_progress(self, replica: Replica) -> None:
        stalled = replica.stalled()
        if stalled > 2 * self._config.watchdog:
            logger.error("engine %d made no step for %.0f s and is killed", replica.index, stalled)
            replica.kill(f"no step for {stalled:.0f} s")

    def _watch(self, seconds: float) -> None:
        for replica in self._replicas:
            replica.send(WatchBlocks(seconds))

    # -------------------------------------------------------------------------------------------------- come, go, queue

    def submit(self, group: abc.Sequence[Sequence]) -> None:
        """Take sequences that share a prompt. Each is given (`Sequence.put`) what it brings, at last one with `finish`.

        Nothing is awaited: a request is in once this returns.

        Raises:
            APIError: as `check_room`; none of the group was taken.
        """
        self.check_room(len(group), sum(len(sequence.prompt) for sequence in group))
        for sequence in group:
            sequence.check()
        with contextlib.ExitStack() as undo:
            for sequence in group:
                undo.callback(self.abort, sequence)
                self._register(sequence)
            undo.pop_all()
        self._pump()

    def _register(self, sequence: Sequence) -> None:
        """Put it into the queue; `_end` takes it out again."""
        by_priority = self._config.paged.scheduler == "priority"
        own = turn(sequence.record.arrival, sequence.priority) if by_priority else 0
        sequence.sort_key = own, next(self._order)
        self._held[sequence] = None
        bisect.insort(self._queue, sequence, key=lambda s: s.sort_key)
        self._queued_tokens += sequence.size
        self._stats.started(sequence.record)
        self._set_timers(sequence)

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """End a sequence, with `finish` being the reason. Does nothing to one that is over."""
        if sequence in self._held:
            self._end(sequence, Delta(sequence.name, finish=reason), tell_engine=True)

    def check_room(self, count: int, tokens: int = 0) -> None:
        """See whether `count` sequences with `tokens` prompt tokens would be taken now.

        Raises:
            APIError: 429, the queue is full; 503, nothing is taken now; 400, more than the server ever takes.
        """
        if self._closed or self.info is None:
            after = self._ready_in()
            raise APIError(503, "the model is still loading; try again soon", code="not_ready", retry_after=after)
        if all(replica.lost for replica in self._replicas):
            after = bounded(self._replicas[0].pause + self._ready_in())
            raise APIError(503, _unstartable(self._replicas[0]), code="engine", retry_after=after)
        seats = sum(replica.room for replica in self._replicas)
        if count > seats + self._config.max_queue_requests:
            most = seats + self._config.max_queue_requests
            raise invalid(f"{count} sequences in one call are more than the {most} that the server ever holds", "n")
        room = sum(replica.room - len(replica.sequences) for replica in self._replicas if replica.state == "ready")
        waiting = len(self._queue) + len(self._returning) + count - room
        most, most_tokens = self._config.max_queue_requests, self._config.max_queue_tokens
        if waiting > most:
            after = self._retry_after()
            message = f"{len(self._queue)} requests are waiting, and {most} may; try again in {after:.0f} s"
            raise APIError(429, message, code="queue_full", retry_after=after)
        if self._queue and self._queued_tokens + tokens > most_tokens:
            after = self._retry_after()
            message = (
                f"{self._queued_tokens} prompt tokens are waiting, and {most_tokens} may; try again in {after:.0f} s"
            )
            raise APIError(429, message, code="queue_full", retry_after=after)

    def _retry_after(self) -> float:
        """Seconds until half of what waits has its turn, at the pace at which sequences end while others wait."""
        pace = self._pace.rate or self._projected()
        if pace is None:  # nothing measured yet: assume that the oldest needs as long again
            oldest = next(iter(self._held), None)
            return bounded(0.0 if oldest is None else time.monotonic() - oldest.record.arrival)
        return bounded((len(self._queue) + len(self._returning) + 1) / 2 / pace)

    def _projected(self) -> float | None:
        """Sequences that will end a second, as far as those on engines have come; None: they have brought nothing.

        By Little's law that is how many there are by how long each stays.
        """
        now, totals = time.monotonic(), self._stats.totals
        ended = sum(totals.finished.get(reason, 0) for reason in ("stop", "length"))
        typical = totals.output_tokens / ended if ended else None
        placed = [one for replica in self._replicas for one in replica.sequences.values()]
        stays = [stay for one in placed if (stay := one.stay(now, typical)) is not None]
        return len(placed) * len(stays) / max(1e-3, sum(stays)) if stays else None

    def _ready_in(self) -> float:
        """Seconds until an engine that is being started may be ready: as long as the first one took.

        While that one loads, as long again as it has taken so far.
        """
        return bounded(time.monotonic() - self._began if self._loading is None else self._loading)

    def _set_timers(self, sequence: Sequence) -> None:
        loop, now = asyncio.get_running_loop(), time.monotonic()
        if sequence.deadline is not None:
            sequence.timers.append(loop.call_later(sequence.deadline - now, self.abort, sequence, "deadline"))
        if sequence.queue_deadline is not None:
            sequence.timers.append(loop.call_later(sequence.queue_deadline - now, self._waited_too_long, sequence))

    def _waited_too_long(self, sequence: Sequence) -> None:
        if sequence.replica is None and not sequence.output and not sequence.returning:
            self._end(sequence, Delta(sequence.name, finish="queue_timeout", retry_after=self._retry_after()))

    # --------------------------------------------------------------------------------------------------------- placing

    def _pump(self) -> None:
        """Hand out what the replicas have room for: first what comes back from dead engines, one at a time each."""
        self._place_returning()
        self._place_queued()
        working = any(replica.state == "ready" for replica in self._replicas)
        self._pace.watch(working and bool(self._queue))

    def _place_queued(self) -> None:
        while self._queue:
            open_ones = [r for r in self._replicas if _has_room(r) and r.probe is None and not self._returning]
            if not open_ones:
                return
            sequence = self._queue.pop(0)
            self._queued_tokens -= sequence.size
            self._place(sequence, open_ones)

    def _place_returning(self) -> None:
        while self._returning:
            free = [r for r in self._replicas if _has_room(r) and r.probe is None]
            if not free:
                return
            self._place(self._returning.pop(0), free)

    def _place(self, sequence: Sequence, replicas: abc.Sequence[Replica]) -> None:
        parent = sequence.parent
        near = [one for one in replicas if parent is not None and not parent.done and one.index == parent.replica]
        replica = near[0] if near else self._router.choose(sequence, replicas)
        replica.place(sequence)

    # ------------------------------------------------------------------------------------------- what the replicas tell

    def replica_ready(self, replica: Replica, ready: Ready) -> None:
        replica.room = ready.max_num_seqs + max(1, ready.max_num_seqs // 8)
        if self.info is None:
            self.info, self._loading = ready, time.monotonic() - self._began
        self._pump()

    def replica_died(self, replica: Replica, sequences: list[Sequence], why: str) -> None:
        self._router.forget(replica)
        fresh = [sequence for sequence in sequences if sequence.fresh]
        if len(fresh) == 1:
            fresh[0].kills += 1
        for sequence in sequences:
            sequence.lost()
            if sequence.kills >= KILLS:
                message = f"the engine died {sequence.kills} times of this request ({why}); it is given up"
                logger.error("%s", message, extra={"request_id": sequence.name})
                self._end(sequence, Delta(sequence.name, finish="error", error=message, error_kind="internal"))
            else:
                self._returning.append(sequence)
        self._returning.sort(key=lambda sequence: (sequence.kills, sequence.sort_key))
        if not self._closed:
            self._stats.restarted(replica.index, why)
            self._pump()

    def replica_brought(self, replica: Replica, delta: Delta) -> None:
        sequence = replica.sequences.get(delta.id)
        if sequence is None:  # aborted meanwhile
            return
        delta = sequence.take(delta)
        proved = replica.probe is sequence and not sequence.returning
        if proved:
            replica.probe = None
        if delta.finish is not None:
            self._end(sequence, delta)
            return
        self._stats.brought(sequence.record, delta)
        sequence.put(delta)
        if proved:
            self._pump()

    def replica_reported(self, replica: Replica, stats: EngineStats) -> None:
        stats.replica = replica.index
        self._stats.engine(stats)

    def _end(self, sequence: Sequence, delta: Delta, *, tell_engine: bool = False) -> None:
        if sequence.done:
            return
        sequence.done = True
        sequence.cancel_timers()
        self._held.pop(sequence, None)
        if sequence.replica is not None:
            self._replicas[sequence.replica].forget(sequence, abort=tell_engine)
        elif sequence in self._returning:
            self._returning.remove(sequence)
        elif sequence in self._queue:
            self._queue.remove(sequence)
            self._queued_tokens -= sequence.size
        assert delta.finish is not None
        self._stats.brought(sequence.record, delta)
        self._stats.ended(sequence.record, delta.finish, delta.error)
        if sequence.output:  # one that never ran says nothing about the pace
            self._pace.done()
        sequence.put(delta)
        self._pump()


def _unstartable(replica: Replica) -> str:
    return f"engine {replica.index} can't be started: {replica.why or 'its supervision has ended'}"


def _has_room(replica: Replica) -> bool:
    return replica.state == "ready" and len(replica.sequences) < replica.room
