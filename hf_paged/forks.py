"""Resets locks and engines in a forked child, where the parent's other threads don't exist."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def after_fork(reset: Callable[[], None]) -> Callable[[], None]:
    """Have `reset` called in each child process that is forked from this one, where the platform forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=reset)
    return reset


def renewed_after_fork(lock: Any) -> Any:
    """The lock, which a forked child finds open: the threads that might hold it are not in the child.

    Args:
        lock: a `threading.Lock` or `RLock` that lives as long as the process.
    """
    after_fork(lock._at_fork_reinit)
    return lock
