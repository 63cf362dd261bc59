"""When requests are sent: at a rate, whatever the server does (open loop), or N at a time (closed loop)."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

Send = Callable[[int, float], Coroutine[Any, Any, None]]  # the request's number, and when it is due


async def open_loop(count: int, rate: float, seed: int, send: Send) -> None:
    """Send `count` requests as a Poisson process of `rate` a second; infinity: all at once."""
    began, due = time.perf_counter(), 0.0
    gaps = _gaps(rate, seed)
    tasks = []
    for number in range(count):
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        tasks.append(asyncio.create_task(send(number, began + due)))
        due += next(gaps)
    await asyncio.gather(*tasks)


async def closed_loop(count: int, concurrency: int, send: Send) -> None:
    """Send `count` requests, `concurrency` of them at a time: an answer that ends makes room for the next."""
    numbers = itertools.count()

    async def worker() -> None:
        while (number := next(numbers)) < count:
            await send(number, time.perf_counter())

    await asyncio.gather(*(worker() for _ in range(min(concurrency, count))))


def _gaps(rate: float, seed: int) -> Iterator[float]:
    """Times between the arrivals of a Poisson process."""
    r = random.Random(seed)
    while True:
        yield 0.0 if rate == float("inf") else r.expovariate(rate)
