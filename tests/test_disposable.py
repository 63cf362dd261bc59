"""Disposable processes: their limits, what their end tells, and that none is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from hf_paged import disposable
from hf_paged.disposable import Ended, NotStarted, Pool

LATE = 60.0  # seconds after which a busy machine isn't to blame
MEMORY = 2**30
PROGRAM = """
import os, sys, time
held = []

def hold(text):
    held.append(bytearray(int(text)))
    return b"held"

def modules(text):
    import hf_paged.text.messages
    return str([name for name in text.split(",") if name in sys.modules]).encode()

def forever(text):
    while True:
        pass

DO = {
    "echo": str.encode,
    "pid": lambda text: str(os.getpid()).encode(),
    "print": lambda text: (print(text, flush=True), b"printed")[1],
    "signal": lambda text: os.kill(os.getpid(), int(text)),
    "exit": lambda text: os._exit(int(text)),
    "hold": hold,
    "modules": modules,
    "forever": forever,
    "sleep": lambda text: time.sleep(float(text)) or b"slept",
}

def answerer(first):
    if first == b"wrong":
        os._exit(3)
    def answer(frame):
        name, _, text = frame.decode().partition(" ")
        return DO[name](text)
    return answer
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.fixture
def pool(program: str) -> Pool:
    return Pool(program, b"", memory=MEMORY, most=2)


def until(done: Callable[[], bool]) -> None:
    limit = time.monotonic() + LATE
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.01)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_process_is_used_again_and_ends_with_its_pool(program: str) -> None:
    pool = Pool(program, b"", memory=MEMORY, most=2)
    pid = int(pool.ask(b"pid", LATE))
    assert pool.ask(b"print not an answer", LATE) == b"printed"
    assert pool.ask(b"echo " + b"x" * 2**22, LATE) == b"x" * 2**22  # many times what a pipe holds
    assert pool.ask(b"echo ", LATE) == b""
    assert int(pool.ask(b"pid", LATE)) == pid
    del pool
    gc.collect()
    assert not alive(pid)


def test_modules_are_imported_without_the_package(pool: Pool) -> None:
    assert pool.ask(b"modules torch,transformers,numpy,hf_paged.text.messages", LATE) == b"['hf_paged.text.messages']"


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (f"signal {signal.SIGSEGV.value}", "stack"),
        (f"signal {signal.SIGBUS.value}", "stack"),
        (f"signal {signal.SIGABRT.value}", "memory"),
        (f"signal {signal.SIGALRM.value}", "time"),
        (f"hold {MEMORY}", "memory"),
        (f"signal {signal.SIGTERM.value}", "status -15"),
        ("exit 7", "status 7"),
        ("unknown", "status 1"),
    ],
)
def test_what_the_end_of_a_process_tells(pool: Pool, frame: str, why: str) -> None:
    before = int(pool.ask(b"pid", LATE))
    with pytest.raises(Ended) as raised:
        pool.ask(frame.encode(), LATE)
    assert raised.value.why == why
    assert int(pool.ask(b"pid", LATE)) != before


def test_a_process_that_takes_too_long_is_killed(pool: Pool) -> None:
    pid = int(pool.ask(b"pid", LATE))
    with pytest.raises(Ended) as raised:
        pool.ask(b"forever", 0.1)
    assert raised.value.why == "time"
    assert not alive(pid)


def test_a_process_is_killed_when_its_frame_is_cancelled(pool: Pool) -> None:
    pid = int(pool.ask(b"pid", LATE))
    cancelled = threading.Event()
    ended: list[Ended] = []

    def ask() -> None:
        with pytest.raises(Ended) as raised:
            pool.ask(b"forever", 10 * LATE, cancelled)
        ended.append(raised.value)

    thread = threading.Thread(target=ask)
    thread.start()
    assert alive(pid)
    cancelled.set()
    thread.join(LATE)
    assert [error.why for error in ended] == ["cancelled"]
    assert not alive(pid)


def test_a_large_process_is_not_used_again(pool: Pool) -> None:
    before = int(pool.ask(b"pid", LATE))
    assert pool.ask(f"hold {MEMORY // 2}".encode(), LATE) == b"held"
    assert int(pool.ask(b"pid", LATE)) != before
    until(lambda: not alive(before))


def test_a_process_that_ended_while_idle_is_no_frames_fault(pool: Pool) -> None:
    pid = int(pool.ask(b"pid", LATE))
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))
    assert pool.ask(b"echo x", LATE) == b"x"


def test_no_more_processes_than_there_may_be(program: str) -> None:
    pool = Pool(program, b"", memory=MEMORY, most=1)
    pids: set[bytes] = set()

    def ask() -> None:
        pool.ask(b"sleep 0.05", LATE)
        pids.add(pool.ask(b"pid", LATE))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LATE)
    assert len(pids) == 1


def test_a_process_that_cannot_be_started(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotStarted, match="can't be started"):
        Pool(program, b"wrong", memory=MEMORY, most=1).ask(b"echo x", LATE)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(NotStarted, match="can't be started"):
        Pool(program, b"", memory=MEMORY, most=1).ask(b"echo x", LATE)


def test_a_process_ends_with_the_one_that_started_it(program: str) -> None:
    """At once when it waits for a frame, and within twice the limit when it works on one."""
    command = [sys.executable, "-I", disposable.__file__, program, str(MEMORY), *sys.path]
    for frames, status in (
        ([(b"", 60)], 0),
        ([(b"", 60), (b"echo cut", 60)], 0),
        ([(b"", 60), (b"forever", 1)], -signal.SIGALRM),
    ):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        sent = b"".join(disposable._QUESTION.pack(len(frame), alarm) + frame for frame, alarm in frames)
        process.communicate(sent[:-1] if frames[-1][0] == b"echo cut" else sent, timeout=LATE)
        assert process.returncode == status
