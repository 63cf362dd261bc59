"""Work that would hold up the event loop, in threads of its own."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

LARGE = 2**16  # bytes; larger bodies are read in a thread
MANY = 1000  # entries; longer lists are processed in a thread
# Only one: each computing thread may block the event loop for as long as one call into C holds the GIL.
_threads = ThreadPoolExecutor(1, thread_name_prefix="heavy")


async def run(function: Callable[..., T], *arguments: Any, threads: ThreadPoolExecutor = _threads, **options: Any) -> T:
    """Call a function in a thread. It is not begun if the caller is cancelled before.

    It must not take long in one step of C, which no other thread interrupts.
    """
    call = functools.partial(function, *arguments, **options)
    return await asyncio.get_running_loop().run_in_executor(threads, call)


async def run_if(heavy: bool, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function: in a thread if it is heavy, or else here, which costs less."""
    return await run(function, *arguments) if heavy else function(*arguments)
