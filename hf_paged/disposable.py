"""Processes that can be thrown away, for work that may take too much time or memory, or end the process it runs in.

A `Pool` sends frames of bytes to processes that run a program, and waits for their answers within limits. The program
is a file with a function `answerer(first)`: it is called with the pool's first frame, and returns the function that
answers the others. It can import modules of hf_paged, but no names from the package itself: these load torch, which
takes seconds.

Run as a file, this module is the process. Then it imports nothing but the standard library before the program does.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import runpy
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator

STARTS_WITHIN = 60.0  # seconds that a busy machine may take to start a process
_GLANCE = 0.05  # seconds between two looks at whether a frame was cancelled
_QUESTION = struct.Struct("<QI")  # bytes of the frame, and seconds after which the process ends itself
_ANSWER = struct.Struct("<Q?")  # bytes of the frame, and whether the process is too large to be used again


class Ended(Exception):
    """There is no answer, and the process is gone.

    Attributes:
        why: "time", "memory" or "stack", of which it took too much; "cancelled"; or its exit status, as "status 1".
    """

    def __init__(self, why: str) -> None:
        super().__init__(f"the process ended without an answer: {why}")
        self.why = why


class NotStarted(RuntimeError):
    """No process could be started, which is no fault of the frame's."""


class Pool:
    """Processes that run one program, each used again until it ends. May be used from several threads.

    Args:
        program: the path of its file.
        first: the first frame of each process.
        memory: bytes of address space that a process may take.
        most: processes at a time; a further frame waits for one of them.
    """

    def __init__(self, program: str, first: bytes, *, memory: int, most: int) -> None:
        self._program, self._first, self._memory = program, first, memory
        self._slots = threading.BoundedSemaphore(most)
        self._idle: deque[_Process] = deque()

    def ask(self, frame: bytes, seconds: float, cancelled: threading.Event | None = None) -> bytes:
        """The answer to a frame.

        Args:
            seconds: that it may take once there is a process for it.
            cancelled: set when the answer is no longer needed; the process is killed then.

        Raises:
            Ended: there is no answer. The next frame gets another process.
            NotStarted: no process could be started for it.
        """
        with self._slots:
            process = self._take()
            answer = process.ask(frame, seconds, cancelled)
            if not process.large:
                self._idle.append(process)
            return answer

    def _take(self) -> _Process:
        """A process that waits for a frame, or a new one."""
        with contextlib.suppress(IndexError):  # none is left
            while not (process := self._idle.pop()).alive:
                pass
            return process
        try:
            return _Process(self._program, self._first, self._memory)
        except (Ended, OSError) as error:
            raise NotStarted(f"a process for {self._program} can't be started: {error}") from error


class _Process:
    """A process of a pool. It is killed when this object goes, if it hasn't ended before.

    Attributes:
        large: it keeps more than half of its memory, so that the next frame may find too little.
    """

    def __init__(self, program: str, first: bytes, memory: int) -> None:
        # It imports from where this process does, and not from the folder of this file, which has a types.py.
        command = [sys.executable, "-I", __file__, program, str(memory), *sys.path]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._end = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._questions, False)
        self.large = False
        self.ask(first, STARTS_WITHIN)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, frame: bytes, seconds: float, cancelled: threading.Event | None = None) -> bytes:
        wait = functools.partial(_wait, time.monotonic() + seconds, cancelled or threading.Event())
        try:
            self._write(_QUESTION.pack(len(frame), 2 * math.ceil(seconds)) + frame, wait)
            length, self.large = _ANSWER.unpack(self._read(_ANSWER.size, wait))
            return self._read(length, wait)
        except BaseException:
            self._end()
            raise

    def _write(self, frame: bytes, wait: Callable[[int, int], None]) -> None:
        left = memoryview(frame)
        while left:
            wait(self._questions, select.POLLOUT)
            try:
                left = left[os.write(self._questions, left) :]
            except BrokenPipeError:  # it has ended: the answer that is missing tells why
                return

    def _read(self, count: int, wait: Callable[[int, int], None]) -> bytes:
        found = bytearray()
        while len(found) < count:
            wait(self._answers, select.POLLIN)
            piece = os.read(self._answers, min(count - len(found), 2**20))
            if not piece:
                raise Ended(_why(self._process.wait()))
            found += piece
        return bytes(found)


def _wait(until: float, cancelled: threading.Event, file: int, event: int) -> None:
    """Wait until a file can be read or written.

    Raises:
        Ended: the time is over, or the frame was cancelled.
    """
    poll = select.poll()  # unlike `select.select` it takes the files of a server with a thousand connections
    poll.register(file, event)
    while True:
        if cancelled.is_set():
            raise Ended("cancelled")
        left = until - time.monotonic()
        if poll.poll(1000 * max(0.0, min(left, _GLANCE))):
            return
        if left <= 0:
            raise Ended("time")


def _why(status: int) -> str:
    """What an exit status tells of the frame that the process worked on."""
    if -status in (signal.SIGSEGV, signal.SIGBUS):
        return "stack"
    if -status in (signal.SIGABRT, signal.SIGKILL):
        return "memory"
    return "time" if -status == signal.SIGALRM else f"status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


# ------------------------------------------------------------------------------------------------- inside the process


def main() -> None:
    """Answer frames until standard input ends, which it does when the other process ends."""
    program, memory, *sys.path[:] = sys.argv[1:]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    _limit(int(memory))
    _bare_package()
    answer: Callable[[bytes], bytes] | None = None
    try:
        for frame in _frames():
            if answer is None:
                answer, found = runpy.run_path(program)["answerer"](frame), b""
            else:
                found = answer(frame)
            answers.write(_ANSWER.pack(len(found), _size() > int(memory) // 2) + found)
            answers.flush()
            signal.alarm(0)
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out


def _limit(memory: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # libraries that start a thread for each core take address space for each


def _bare_package() -> None:
    """Let modules of hf_paged be imported without its `__init__`, which loads torch."""
    package = sys.modules["hf_paged"] = types.ModuleType("hf_paged")
    package.__path__ = [os.path.dirname(__file__)]


def _frames() -> Iterator[bytes]:
    """The frames. Each sets an alarm that ends this process, should the other one be gone and unable to do it."""
    source = sys.stdin.buffer
    while len(head := source.read(_QUESTION.size)) == _QUESTION.size:
        length, seconds = _QUESTION.unpack(head)
        frame = source.read(length)
        if len(frame) < length:
            return
        signal.alarm(seconds)
        yield frame


def _size() -> int:
    """Bytes of address space that this process has; 0 where the system doesn't tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
