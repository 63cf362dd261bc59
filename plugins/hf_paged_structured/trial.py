"""Compiling a grammar in a process that may die of it, before the engine's own process does.

A grammar of a hundred kilobytes can overflow the native stack of its parser, which ends the process, or take a minute
and gigabytes. So one that is long is compiled here first: on a small stack, in bounded memory and time.

Run as a file, this is that process. It imports nothing but llguidance: frames on standard input are first the tokenizer
and the ids that end an output, as JSON, then grammars; for each one it answers with what is wrong, or nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

SECONDS = 10.0  # that a grammar may take to compile
MEMORY = 4 * 2**30  # bytes of address space that it may take
STACK = 2**20  # bytes; a thread of the engine's process has eight times that
PROCESSES = 2  # grammars that are tried at a time
STARTS_WITHIN = 60.0  # seconds that a busy machine may take to start one

_LENGTH = struct.Struct("<Q")


class Trials:
    """Processes that compile grammars for one tokenizer. May be used from several threads.

    Args:
        definition: the tokenizer's, as JSON.
        ends: ids that end an output.
    """

    def __init__(self, definition: str, ends: Sequence[int]) -> None:
        self._first = json.dumps({"definition": definition, "ends": list(ends)}).encode()
        self._slots = threading.BoundedSemaphore(PROCESSES)
        self._idle: deque[_Process] = deque()

    def problem_of(self, grammar: str) -> str | None:
        """What keeps a grammar from being compiled, or None. Waits while others are tried."""
        with self._slots:
            process = self._idle.pop() if self._idle else _Process(self._first)
            try:
                answer = process.ask(grammar.encode(), SECONDS)
            except _Ended as ended:
                return str(ended)
            self._idle.append(process)
            return answer.decode() or None


class _Ended(Exception):
    """The process is gone; the message says what that tells of the grammar."""


class _Process:
    def __init__(self, first: bytes) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._end = weakref.finalize(self, _end, self._process)
        self.ask(first, STARTS_WITHIN)

    def ask(self, frame: bytes, seconds: float) -> bytes:
        """The answer to a frame.

        Raises:
            _Ended: there is none, and the process is gone.
        """
        assert self._process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died meanwhile: the answer tells
                _write(self._process.stdin, frame)
            until = time.monotonic() + seconds
            length = _LENGTH.unpack(self._read(_LENGTH.size, until))[0]
            return self._read(length, until)
        except BaseException:
            self._end()
            raise

    def _read(self, count: int, until: float) -> bytes:
        assert self._process.stdout is not None
        found, file = b"", self._process.stdout.fileno()
        while len(found) < count:
            if not select.select([file], [], [], max(0.0, until - time.monotonic()))[0]:
                raise _Ended(f"it takes more than {SECONDS:g} s to compile")
            piece = os.read(file, count - len(found))
            if not piece:
                raise _Ended(_cause(self._process.wait()))
            found += piece
        return found


def _cause(status: int) -> str:
    if -status in (signal.SIGSEGV, signal.SIGBUS):
        return "it nests or chains its rules too deeply"
    if -status in (signal.SIGABRT, signal.SIGKILL):
        return f"it takes more than {MEMORY / 2**30:g} GiB to compile"
    return f"compiling it ended the process that tried it (status {status})"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _write(stream: IO[bytes], frame: bytes) -> None:
    stream.write(_LENGTH.pack(len(frame)) + frame)
    stream.flush()


# ------------------------------------------------------------------------------------------------- inside the process


def main() -> None:
    """Answer until standard input ends."""
    import resource

    source, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.path.pop(0)  # this file's folder, whose modules are others' than their names say
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tokenizer = None
    while (frame := _frame(source)) is not None:
        if tokenizer is None:
            tokenizer = _tokenizer(**json.loads(frame))
            _write(answers, b"")
        else:
            signal.alarm(2 * math.ceil(SECONDS))  # if the other process is gone by then, and can't end this one
            _write(answers, _tried(tokenizer, frame.decode()).encode())
            signal.alarm(0)


def _frame(source: IO[bytes]) -> bytes | None:
    head = source.read(_LENGTH.size)
    return source.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else None


def _tokenizer(definition: str, ends: list[int]) -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer(definition, eos_token=ends)


def _tried(tokenizer: Any, grammar: str) -> str:
    from llguidance import LLMatcher, LLParserLimits

    found: list[str] = []

    def compile_it() -> None:
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        found.append(matcher.get_error() if matcher.is_error() else "")

    threading.stack_size(STACK)
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    return found[0] if found else "the parser fails on it"


if __name__ == "__main__":
    main()
