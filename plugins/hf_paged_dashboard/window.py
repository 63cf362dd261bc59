"""What happened in the last seconds: counts, and percentiles of times, in memory that doesn't grow with the load."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable

_STEP = math.log(1.08)  # bounds of the buckets grow by 8 %: no percentile is off by more than 4 %


class Counts:
    """How much came in each of the last seconds.

    Args:
        seconds: how many are kept.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._kept: deque[tuple[int, int]] = deque()

    def add(self, count: int) -> None:
        """So many more, now."""
        now = int(self._clock())
        if self._kept and self._kept[-1][0] == now:
            self._kept[-1] = (now, self._kept[-1][1] + count)
        else:
            self._kept.append((now, count))
            self._drop(now)

    def series(self) -> list[int]:
        """The counts of the seconds that are over, oldest first."""
        now = int(self._clock())
        self._drop(now)
        found = dict(self._kept)
        return [found.get(now - back, 0) for back in range(self._seconds, 0, -1)]

    def _drop(self, now: int) -> None:
        while self._kept and self._kept[0][0] < now - self._seconds:
            self._kept.popleft()


class Times:
    """Percentiles of the times measured in the last seconds, from buckets on a logarithmic scale.

    Args:
        seconds: how many are kept.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._kept: deque[tuple[int, Counter[int]]] = deque()

    def add(self, value: float, count: int = 1) -> None:
        """A time that was measured now, `count` times."""
        now = int(self._clock())
        if not self._kept or self._kept[-1][0] != now:
            self._kept.append((now, Counter()))
            self._drop(now)
        self._kept[-1][1][math.floor(math.log(max(value, 1e-6)) / _STEP)] += count

    def percentiles(self, *shares: float) -> list[float] | None:
        """For each share the time that it stays below, in seconds; None: nothing was measured."""
        self._drop(int(self._clock()))
        merged: Counter[int] = Counter()
        for _, counts in self._kept:
            merged.update(counts)
        total = merged.total()
        return [_at(merged, share * total) for share in shares] if total else None

    def _drop(self, now: int) -> None:
        while self._kept and self._kept[0][0] <= now - self._seconds:
            self._kept.popleft()


def _at(counts: Counter[int], rank: float) -> float:
    seen = 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= rank:
            return math.exp((bucket + 0.5) * _STEP)
    raise AssertionError("a rank beyond the last bucket")
