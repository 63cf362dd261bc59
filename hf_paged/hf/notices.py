"""Warnings to the caller of a patched model: once each, at the caller's own line, and never about calls of ours."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# As the package was imported, symlinks not resolved: the file names of frames are written so too.
_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
_quiet: ContextVar[bool] = ContextVar("hf_paged_quiet", default=False)


def warn(message: str) -> None:
    """Warn, with the line outside of hf_paged that the call came from."""
    warnings.warn(message, stacklevel=_callers_level())


def warn_loudly(message: str) -> None:
    """Warn even where the program has warnings switched off or turned into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(message, stacklevel=_callers_level())


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Transformers calls `generate()` itself, such as an assistant's: its user passed none of the arguments."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether this thread is inside `quiet()`."""
    return _quiet.get()


def _callers_level() -> int:
    """The `stacklevel`, for who called this module, of the first frame outside of the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
