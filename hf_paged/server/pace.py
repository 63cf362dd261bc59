"""How fast work gets done while some waits: what Retry-After is estimated from."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW = 60  # seconds of work that the rate is measured over
SHORTEST, LONGEST = 1.0, 60.0  # seconds that a client is asked to wait


class Pace:
    """The work done a second, over the last minute in which work was waiting.

    While nothing waits, work is done as it comes, which doesn't tell how fast it could be done. So the clock stands
    then: neither an idle night counts nor an hour of single requests.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None  # when the clock was last read, while it runs
        self._seconds = 0.0  # how long the clock has run
        self._kept: deque[tuple[int, float]] = deque()  # a second of it, and the work done then

    def watch(self, waiting: bool) -> None:
        """Tell whether work waits from now on."""
        now = self._clock()
        if self._since is not None:
            self._seconds += now - self._since
        self._since = now if waiting else None

    def done(self, amount: float = 1.0) -> None:
        """Tell that work was done; it counts if some was waiting meanwhile."""
        if self._since is None:
            return
        self.watch(True)
        second = int(self._seconds)
        if self._kept and self._kept[-1][0] == second:
            amount += self._kept.pop()[1]
        self._kept.append((second, amount))
        self._drop()

    @property
    def rate(self) -> float | None:
        """The work done a second, or None: none was done, or work has waited for less than a second so far."""
        self.watch(self._since is not None)
        self._drop()
        total = sum(amount for _, amount in self._kept)
        return total / min(WINDOW, self._seconds) if total and self._seconds >= 1 else None

    def _drop(self) -> None:
        while self._kept and self._kept[0][0] <= self._seconds - WINDOW:
            self._kept.popleft()


def bounded(seconds: float) -> float:
    """An estimate as a client is told it: neither a busy loop nor an hour for a measurement that was off."""
    return min(LONGEST, max(SHORTEST, seconds))
