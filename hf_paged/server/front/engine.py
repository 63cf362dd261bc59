"""What the front asks of an engine, wherever it runs: a few methods."""

from __future__ import annotations

import dataclasses
from collections import abc
from typing import Protocol

from hf_paged.server.front.sequence import Sequence
from hf_paged.server.messages import Ready


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


class EngineClient(Protocol):
    """An engine, or several that look like one. Used in the event loop alone."""

    info: Ready | None

    def check_room(self, count: int, tokens: int = 0) -> None:
        """See whether `count` sequences with `tokens` prompt tokens would be taken now.

        Raises:
            APIError: 429, the queue is full; 503, nothing is taken now; 400, more than the server ever takes.
        """
        ...

    def submit(self, group: abc.Sequence[Sequence]) -> None:
        """Take sequences that share a prompt. Each is given (`Sequence.put`) what it brings, at last one with `finish`.

        Nothing is awaited: a request is in once this returns.

        Raises:
            APIError: as `check_room`; none of the group was taken.
        """
        ...

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """End a sequence, with `finish` being the reason. Does nothing to one that is over."""
        ...

    def abort_all(self) -> None:
        """End every sequence, and take no more."""
        ...

    def snapshot(self) -> Snapshot:
        """How it is doing."""
        ...

    async def close(self) -> None:
        """End everything, processes too. Sequences that have not ended end with abort."""
        ...
