"""What the server does right now and did before: the one place where metrics, dashboard and logs hear of it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from hf_paged.server.messages import Delta, EngineStats

logger = logging.getLogger(__name__)

KEPT = 1000  # finished records


@dataclasses.dataclass(eq=False)
class RequestRecord:
    """One sequence, from its acceptance to its end; a call with n completions has n of them.

    Attributes:
        request_id: the engine's id. client_id: the id of the call, as echoed in X-Request-Id.
        endpoint: the path that was called. model: the name it was called by. user: as the client named itself.
        index: which of the call's sequences it is. n: completions asked for.
        prompt_tokens, cached_tokens, output_tokens: counts so far; cached: found in the prefix cache.
        max_tokens: the limit of its output.
        stream: whether the answer is streamed.
        traceparent: the incoming W3C trace context, or None.
        start_ns, end_ns: `time.time_ns()` of its acceptance and of its end.
        arrival, first_token, last_token, finished: points in `time.monotonic()`, or None.
        queue, prefill, decode: seconds until first scheduled, from there to the first token, from there to the last.
        gap_sum, gap_max: of the seconds between two deliveries of tokens.
        finish_reason: stop, length, abort, error, deadline, queue_timeout, or refused: turned away before it ran.
        error: message, if it is error or refused.
        replica: where it runs or ran last. resumed: how often it was resumed. preemptions: how often it was preempted.
    """

    request_id: str
    client_id: str
    endpoint: str = ""
    model: str = ""
    user: str | None = None
    index: int = 0
    n: int = 1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    max_tokens: int | None = None
    stream: bool = False
    traceparent: str | None = None
    start_ns: int = dataclasses.field(default_factory=time.time_ns)
    end_ns: int | None = None
    arrival: float = dataclasses.field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    queue: float | None = None
    prefill: float | None = None
    decode: float | None = None
    gap_sum: float = 0.0
    gap_max: float = 0.0
    finish_reason: str | None = None
    error: str | None = None
    replica: int | None = None
    resumed: int = 0
    preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from acceptance to the first token, or None."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def latency(self) -> float | None:
        """Seconds from acceptance to the end, or None."""
        return None if self.finished is None else self.finished - self.arrival


@dataclasses.dataclass
class Totals:
    """Counters since the server began. They never fall, also when an engine is replaced."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    restarts: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)  # by finish reason, but for refused
    refused: dict[str, int] = dataclasses.field(default_factory=dict)  # by reason


class ServerStats:
    """Told by the front what happens; tells its listeners, and keeps the present state.

    Used in the event loop alone. A listener that raises is logged once and dropped.

    Attributes: see the package's docstring.
    """

    def __init__(self) -> None:
        self.running: dict[str, RequestRecord] = {}
        self.waiting: dict[str, RequestRecord] = {}
        self.engines: dict[int, EngineStats] = {}
        self.totals = Totals()
        self.recent: deque[RequestRecord] = deque(maxlen=KEPT)
        self.on_watch: Callable[[float], None] = lambda seconds: None
        self._listeners: list[Any] = []

    def subscribe(self, listener: Any) -> None:
        """Have `listener`'s methods called; see the package's docstring for which there are."""
        self._listeners.append(listener)

    def watch_blocks(self, seconds: float) -> None:
        """Ask the engines for their block map, for this many seconds."""
        self.on_watch(seconds)

    # --------------------------------------------------------------------------------------------- told by the front

    def started(self, record: RequestRecord) -> None:
        """A request was accepted; it waits."""
        self.waiting[record.request_id] = record
        self.totals.requests += 1
        self.totals.prompt_tokens += record.prompt_tokens
        self._tell("request_started", record)

    def brought(self, record: RequestRecord, delta: Delta) -> None:
        """Tokens of a request reached the front."""
        now = time.monotonic()
        if delta.cached is not None and record.first_token is None:
            record.cached_tokens = delta.cached
            self.totals.cached_tokens += delta.cached
        if delta.finish is not None:
            record.queue, record.prefill, record.decode = delta.queued, delta.prefill, delta.decode
            record.preemptions += delta.preemptions
        if not delta.tokens:
            return
        gap = None if record.last_token is None else now - record.last_token
        record.first_token = record.first_token or now
        record.last_token = now
        record.output_tokens += len(delta.tokens)
        record.gap_sum += gap or 0.0
        record.gap_max = max(record.gap_max, gap or 0.0)
        self.totals.output_tokens += len(delta.tokens)
        if self.waiting.pop(record.request_id, None) is not None:
            self.running[record.request_id] = record
        self._tell("tokens", record, len(delta.tokens), gap)

    def ended(self, record: RequestRecord, reason: str, error: str | None = None) -> None:
        """A request is over. Told twice, the first time counts."""
        if record.finish_reason is not None:
            return
        self.waiting.pop(record.request_id, None)
        self.running.pop(record.request_id, None)
        record.finish_reason, record.error = reason, error
        record.finished, record.end_ns = time.monotonic(), time.time_ns()
        if reason != "refused":  # the call it belongs to counts as one that was turned away
            self.totals.finished[reason] = self.totals.finished.get(reason, 0) + 1
        self.recent.append(record)
        self._tell("request_finished", record)

    def refused(self, reason: str) -> None:
        """A call was turned away before it began."""
        self.totals.refused[reason] = self.totals.refused.get(reason, 0) + 1
        self._tell("request_refused", reason)

    def engine(self, stats: EngineStats) -> None:
        """A replica reports."""
        before = self.engines.get(stats.replica)
        fresh = before is None or stats.num_steps < before.num_steps  # a new process counts from 0
        for total, name in (
            ("prefix_queries", "prefix_queries"),
            ("prefix_hits", "prefix_hits"),
            ("preemptions", "preemptions"),
            ("steps", "num_steps"),
        ):
            base = 0 if before is None or fresh else getattr(before, name)
            setattr(self.totals, total, getattr(self.totals, total) + max(0, getattr(stats, name) - base))
        self.engines[stats.replica] = stats
        self._tell("engine_stats", stats)

    def restarted(self, replica: int, why: str) -> None:
        """A replica's process died, and another one is started."""
        self.totals.restarts += 1
        self.engines.pop(replica, None)
        self._tell("engine_restarted", replica, why)

    def _tell(self, event: str, *arguments: Any) -> None:
        for listener in list(self._listeners):
            method = getattr(listener, event, None)
            if method is None:
                continue
            try:
                method(*arguments)
            except Exception:
                logger.exception("the listener %r raised in %s and is dropped", listener, event)
                self._listeners.remove(listener)
