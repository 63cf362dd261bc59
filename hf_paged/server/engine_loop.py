"""The loop of an engine process: read what the front says, step, tell what it brought."""

from __future__ import annotations

import logging
import math
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import zmq

from hf_paged.engine.engine import Engine
from hf_paged.engine.loop import drive
from hf_paged.errors import ConfigError, InvalidRequestError, RequestRejectedError
from hf_paged.params import SamplingParams
from hf_paged.request import Logprob, Request, RequestMetrics
from hf_paged.server.messages import (
    Abort,
    Add,
    BlockGroup,
    Delta,
    Deltas,
    EngineStats,
    StepRecord,
    Stop,
    TokenLogprobs,
    WatchBlocks,
    decode_to_engine,
    encode,
)
from hf_paged.stats import StepStats

logger = logging.getLogger("hf_paged.server.worker")

REPORT_BUSY, REPORT_IDLE = 0.2, 1.0  # seconds between two statistics
CONSTRAINTS = 32  # made at a time: one that takes seconds doesn't hold up those of others
EXIT_DEVICE_LOST = 70  # the exit status when the device can't be used any more
_DEVICE_LOST = ("CUDA error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS", "unspecified launch failure")


class StepLog:
    """A step observer that keeps what the front is told later."""

    def __init__(self) -> None:
        self.count = 0
        self._records: list[StepRecord] = []

    def __call__(self, stats: StepStats) -> None:
        """Take note of a step."""
        self.count += 1
        self._records.append(StepRecord(stats.num_prefill_tokens, stats.num_decode_tokens, stats.duration))

    def take(self) -> list[StepRecord]:
        """The steps since the last call."""
        taken, self._records = self._records, []
        return taken


class EngineLoop:
    """The mailbox of an engine process: carries the front's requests over one engine, in one thread.

    Args:
        engine: stepped by this alone.
        inbox, outbox: sockets from and to the front.
        log: sees the engine's steps.
        replica: the index that statistics bear.
        constrain: gives a request with structured outputs its constraint; called in a thread of its own.
        owner: what has to live as long as the loop; the LLM, whose end would take the model's fused layers along.
    """

    def __init__(
        self,
        engine: Engine,
        inbox: zmq.Socket[bytes],
        outbox: zmq.Socket[bytes],
        log: StepLog,
        replica: int,
        constrain: Callable[[Request], None],
        owner: object = None,
    ) -> None:
        self._engine = engine
        self._owner = owner
        self._inbox, self._outbox = inbox, outbox
        self._log = log
        self._replica = replica
        self._constrain = constrain
        self._carried: dict[str, _Carried] = {}
        self._dirty: dict[str, _Carried] = {}
        self._refused: list[Delta] = []
        self._threads = ThreadPoolExecutor(CONSTRAINTS, thread_name_prefix="constraints")
        self._constrained: queue.SimpleQueue[tuple[Request, Exception | None]] = queue.SimpleQueue()
        self._constraining = 0
        self._watched_until = 0.0
        self._next_report = 0.0
        self._stopping = False

    def run(self) -> None:
        """Go on until the front says stop."""
        drive(self._engine, self)
        self._engine.close()

    # ------------------------------------------------------------------------------------------------------- the inbox

    def read(self) -> bool:
        """Take every message that is there; with nothing to do, wait for one until the next report is due."""
        wait = 0.0 if self._engine.has_work or self._refused else max(0.0, self._next_report - time.monotonic())
        timeout = math.ceil(1000 * (min(wait, 0.005) if self._constraining else wait))
        while self._inbox.poll(timeout):
            timeout = 0
            self._handle(decode_to_engine(self._inbox.recv()))
        while not self._constrained.empty():
            self._take_constrained(*self._constrained.get())
        return not self._stopping

    def _handle(self, message: Any) -> None:
        if isinstance(message, Add):
            self._add(message)
        elif isinstance(message, Abort):
            for name in message.ids:
                carried = self._carried.pop(name, None)
                if carried is not None:
                    self._dirty.pop(name, None)
                    self._engine.abort(carried.request)
        elif isinstance(message, WatchBlocks):
            self._watched_until = time.monotonic() + message.seconds
            self._next_report = 0.0
        elif isinstance(message, Stop):
            self._stopping = True

    def _add(self, message: Add) -> None:
        parent = self._carried.get(message.parent or "")
        try:
            request = Request(
                request_id=message.id,
                prompt_token_ids=message.prompt,
                params=SamplingParams(**message.params),
                eos_token_ids=frozenset(message.eos),
                priority=message.priority,
                banned=tuple(map(tuple, message.banned)),
                cache_key=message.cache_key,
                parent=parent.request if parent else None,
                resume_from=message.output,
                metrics=RequestMetrics() if message.arrival is None else RequestMetrics(message.arrival),
            )
        except ConfigError as error:
            self._refuse(message.id, error)
            return
        self._carried[message.id] = _Carried(request)
        if request.params.structured_outputs is None:
            self._begin(request)
        else:
            self._constraining += 1
            self._threads.submit(self._make_constraint, request)

    def _make_constraint(self, request: Request) -> None:
        try:
            if request.request_id in self._carried:  # else its client has left
                self._constrain(request)
        except Exception as error:
            self._constrained.put((request, error))
        else:
            self._constrained.put((request, None))

    def _take_constrained(self, request: Request, error: Exception | None) -> None:
        self._constraining -= 1
        carried = self._carried.get(request.request_id)
        if carried is None or carried.request is not request:  # aborted meanwhile
            return
        if error is not None:
            del self._carried[request.request_id]
            self._refuse(request.request_id, error)
        else:
            self._begin(request)

    def _begin(self, request: Request) -> None:
        request.on_token = self._note
        try:
            self._engine.add(request)
        except Exception as error:
            self._carried.pop(request.request_id, None)
            self._refuse(request.request_id, error)

    def _refuse(self, name: str, error: Exception) -> None:
        after, kind = error.retry_after if isinstance(error, RequestRejectedError) else None, _kind(error)
        finish = "error" if kind == "internal" else "refused"  # what broke here is no fault of the request's
        self._refused.append(Delta(name, finish=finish, error=str(error), error_kind=kind, retry_after=after))

    # ------------------------------------------------------------------------------------------------------ the outbox

    def _note(self, request: Request) -> None:
        """Called by the engine after each new token, and at the end."""
        if request.error is not None and is_device_lost(request.error):
            logger.critical("the device is lost, the process ends: %s", request.error)
            os._exit(EXIT_DEVICE_LOST)
        carried = self._carried.get(request.request_id)
        if carried is not None and carried.request is request:
            self._dirty[request.request_id] = carried

    def landed(self) -> None:
        """Tell the front what the messages and the step brought."""
        self._send_deltas()
        self._report()

    def _send_deltas(self) -> None:
        if not self._dirty and not self._refused:
            return
        deltas, self._refused = self._refused, []
        for name, carried in self._dirty.items():
            deltas.append(carried.take())
            if carried.request.finished:
                del self._carried[name]
        self._dirty = {}
        self._outbox.send(encode(Deltas(deltas)))

    def _report(self) -> None:
        now, busy = time.monotonic(), self._engine.has_work
        if now < self._next_report:
            return
        self._next_report = now + (REPORT_BUSY if busy else REPORT_IDLE)
        self._outbox.send(encode(self._stats(now, busy)))

    def _stats(self, now: float, busy: bool) -> EngineStats:
        scheduler, stats = self._engine.scheduler, self._engine.stats
        running = list(scheduler.running)
        return EngineStats(
            replica=self._replica,
            time=now,
            num_steps=self._log.count,
            busy=busy,
            running=[request.request_id for request in running],
            waiting=[request.request_id for request in scheduler.waiting],
            kv_usage=self._engine.pool.tables.usage,
            num_blocks=stats.num_blocks,
            num_free=stats.num_free,
            block_size=self._engine.config.block_size,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            preemptions=stats.num_preemptions,
            steps=self._log.take(),
            groups=self._groups([request for request in running if request.tables], watched=now < self._watched_until),
        )

    def _groups(self, holders: list[Request], *, watched: bool) -> list[BlockGroup]:
        tables = self._engine.pool.tables
        made = self._engine.stats.num_blocks > 0
        found = []
        for group, (window, pool) in enumerate(zip(tables.windows, tables.pools, strict=True)):
            blocks = {one.request_id: list(one.tables[group]) for one in holders} if watched else None
            num_blocks, num_free = (pool.num_blocks - 1, pool.num_free) if made else (0, 0)
            found.append(BlockGroup(window, num_blocks, num_free, blocks))
        return found


class _Carried:
    """A request in the engine, and how much of it was told."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._told = len(request.token_ids)
        self._begun = self._told
        self._began = False
        self._came = time.monotonic()

    def take(self) -> Delta:
        """What is new since the last call."""
        request = self.request
        delta = Delta(request.request_id, tokens=request.token_ids[self._told :])
        if request.logprobs is not None:
            told = self._told - self._begun
            new = request.logprobs[told : told + len(delta.tokens)]
            delta.logprobs = [_packed(entry) for entry in new]
        if delta.tokens and not self._began:
            self._began = True
            delta.cached = request.num_cached or 0
            if request.prompt_logprobs is not None:
                delta.prompt_logprobs = [None if entry is None else _packed(entry) for entry in request.prompt_logprobs]
        self._told += len(delta.tokens)
        if request.finished:
            self._finish(delta)
        return delta

    def _finish(self, delta: Delta) -> None:
        request, metrics = self.request, self.request.metrics
        delta.finish = request.finish_reason
        delta.stop_reason = request.stop_reason if isinstance(request.stop_reason, int) else None
        if request.error is not None:
            delta.error, delta.error_kind = str(request.error), _kind(request.error)
        end = metrics.finished_time or time.monotonic()
        scheduled = metrics.first_scheduled_time or end
        first = metrics.first_token_time or end
        delta.queued = scheduled - self._came  # the front adds what it waited there
        delta.prefill, delta.decode = first - scheduled, end - first
        delta.preemptions = metrics.num_preemptions


def _packed(entry: dict[int, Logprob]) -> TokenLogprobs:
    values = list(entry.values())
    return TokenLogprobs(list(entry), [x.logprob for x in values], [x.rank or 0 for x in values])


def _kind(error: BaseException) -> str:
    if isinstance(error, RequestRejectedError):
        return "rejected"
    return "invalid" if isinstance(error, (InvalidRequestError, ConfigError)) else "internal"


def is_device_lost(error: BaseException) -> bool:
    """Whether the device can't be used any more by this process; running out of memory is not that."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(error, lost) or any(text in str(error) for text in _DEVICE_LOST)
