"""One caller's requests in an engine that an owner thread steps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from hf_paged.engine.engine import Engine
from hf_paged.request import Request

if TYPE_CHECKING:
    from hf_paged.engine.thread import EngineThread


class Call:
    """One caller's requests in an engine. Leaving it, by an exception too, aborts what is unfinished."""

    _numbers = itertools.count()

    def __init__(self, thread: EngineThread, requests: Sequence[Request]) -> None:
        self._thread = thread
        self._requests = requests
        self._number = next(self._numbers)
        self._next: Callable[[], None] | None = None  # what the owner thread does before the next wait

    def __enter__(self) -> Call:
        self._next = self._thread.enter(self._number, self._requests)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.leave(self._number, self._requests)

    def __del__(self) -> None:
        """An interrupt may strike as the call is entered or left: what is forgotten then goes with this object."""
        self._thread.forsake(self._number, self._requests)

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until `done`. The first wait queues the requests; one after `push` hands over what was pushed."""
        after, self._next = self._next, None
        self._thread.wait(done, after=after)

    def push(self, tokens: Sequence[tuple[Request, int, bool]]) -> None:
        """Give requests that await their tokens the next ones: (request, token, whether it ends the request)."""
        self._next = functools.partial(_push, self._thread.engine, tokens)


def raise_errors(requests: Sequence[Request]) -> None:
    """Raise what ended one of the requests, if anything did."""
    for request in requests:
        if request.error is not None:
            raise request.error


def _push(engine: Engine, tokens: Sequence[tuple[Request, int, bool]]) -> None:
    for request, token, stop in tokens:
        if not request.finished:
            engine.push(request, token, stop=stop)
