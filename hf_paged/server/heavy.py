"""Work that would hold up the event loop, in threads of its own."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

LARGE = 2**16  # bytes of a body, above which it is read in a thread
MANY = 1000  # entries of a list, above which it is gone through in a thread
# One: each thread that computes may keep the event loop waiting for one long step of C.
_threads = ThreadPoolExecutor(1, thread_name_prefix="heavy")


async def run(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call a function in a thread. It must not take long in one step of C, which no other thread interrupts."""
    call = functools.partial(function, *arguments, **options)
    return await asyncio.get_running_loop().run_in_executor(_threads, call)


async def run_if(heavy: bool, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function: in a thread if it is heavy, or else here, which costs less."""
    return await run(function, *arguments) if heavy else function(*arguments)
