"""Where the server is in its life, and what is refused because of it."""

from __future__ import annotations

import enum
import inspect
import logging
import time
from collections.abc import Callable
from typing import Any

from hf_paged.server.errors import APIError

logger = logging.getLogger(__name__)


class Phase(enum.Enum):
    """What the server is doing with itself."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle:
    """The phase, the calls in flight, and what plugins want done at the start and at the end.

    Attributes:
        phase: set by `serve`.
        in_flight: calls that were accepted and have not been answered in full.
        on_start, on_stop: callables, sync or async; run when the server is about to listen, and after its last answer.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.in_flight = 0
        self.started = time.time()
        self.on_start: list[Callable[[], Any]] = []
        self.on_stop: list[Callable[[], Any]] = []

    @property
    def draining(self) -> bool:
        """Whether new work is refused for good."""
        return self.phase in (Phase.DRAINING, Phase.STOPPED)

    def check(self) -> None:
        """Refuse new work while the server is going down.

        Raises:
            APIError: 503.
        """
        if self.draining:
            raise APIError(503, "the server is shutting down; try another one", code="draining", retry_after=5)

    async def run(self, callbacks: list[Callable[[], Any]]) -> None:
        """Run start-up or clean-up work. At the start an error stops the server; at the end it is logged."""
        for callback in callbacks:
            try:
                result = callback()
                if inspect.isawaitable(result):
                    await result
            except Exception:
                if callbacks is self.on_start:
                    raise
                logger.exception("clean-up work %r failed", callback)
