"""What the front asks of an engine, wherever it runs: a few methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from hf_paged.params import SamplingParams
from hf_paged.server.messages import Delta, Ready
from hf_paged.server.stats import RequestRecord


@dataclasses.dataclass(eq=False)
class Submission:
    """One sequence to be carried, as the front knows it.

    Attributes:
        record: who it is, and what becomes of it.
        prompt: token ids.
        params: how tokens are chosen; `n` is 1, and a sampled one has a seed.
        eos: ids that end it.
        banned: token sequences that must not be produced.
        priority: smaller runs first, where the scheduler is "priority"; a level is worth a minute of waiting.
        cache_key: only requests of the same key share blocks.
        parent: a submission with the same prompt, handed in just before, whose blocks it shares.
        deadline, queue_deadline: points in `time.monotonic()` after which it ends, or ends unless it has begun.
    """

    record: RequestRecord
    prompt: Sequence[int]
    params: SamplingParams
    eos: frozenset[int] = frozenset()
    banned: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_key: str | None = None
    parent: Submission | None = None
    deadline: float | None = None
    queue_deadline: float | None = None


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


class DeltaStream(Protocol):
    """What a sequence brings; the delta with `finish` is the last."""

    def __aiter__(self) -> DeltaStream:
        """Itself."""
        ...

    async def __anext__(self) -> Delta:
        """What came since the last call, as one delta; waits for something."""
        ...

    async def aclose(self) -> None:
        """Leave. Before the end that aborts the sequence."""
        ...


class EngineClient(Protocol):
    """An engine, or several that look like one. Used in the event loop alone."""

    info: Ready | None

    def check_room(self, count: int, tokens: int = 0) -> None:
        """See whether `count` sequences with `tokens` prompt tokens would be taken now.

        Raises:
            APIError: 429, the queue is full; 503, nothing is taken now; 400, more than the server ever takes.
        """
        ...

    def submit(self, group: Sequence[Submission]) -> Sequence[DeltaStream]:
        """Take sequences that share a prompt; for each the stream of what it brings, which ends after `finish`.

        Nothing is awaited: a request is in once this returns. Leaving a stream early (`aclose`) aborts its sequence.

        Raises:
            APIError: as `check_room`; none of the group was taken.
        """
        ...

    def abort(self, submission: Submission, reason: str = "abort") -> None:
        """End a sequence; its stream ends with `finish` being the reason. Does nothing to one that is over."""
        ...

    def abort_all(self) -> None:
        """End every sequence, and take no more."""
        ...

    def snapshot(self) -> Snapshot:
        """How it is doing."""
        ...

    async def close(self) -> None:
        """End everything, processes too. Streams that are open end with abort."""
        ...
