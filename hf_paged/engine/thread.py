"""The owner thread: one thread steps an engine, for callers in any number of others."""

from __future__ import annotations

import _thread
import atexit
import functools
import itertools
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch

from hf_paged.engine.engine import Engine
from hf_paged.engine.staging import recorded
from hf_paged.errors import UnsupportedCallError
from hf_paged.forks import after_fork
from hf_paged.request import Request, Status

logger = logging.getLogger(__name__)
T = TypeVar("T")

IDLE = 5.0  # seconds without a message after which the thread ends
LOOKS = 1.0  # seconds after which a waiting caller looks whether there is an owner
ENDS = 60.0  # seconds that the interpreter's end waits for a step under way


class Mailbox(Protocol):
    """Where a loop's work comes from, and who hears of what came of it."""

    def read(self) -> bool:
        """Carry out the messages that are there. False: the loop ends."""

    def landed(self) -> None:
        """Called after the messages and after each step."""


def drive(engine: Engine, mailbox: Mailbox) -> None:
    """Step an engine between messages until its mailbox ends the loop: an owner thread's, and an engine process's."""
    while mailbox.read():
        if engine.has_work:
            engine.step()
        mailbox.landed()


class EngineThread:
    """Steps one engine in a thread of its own. Callers put messages into its inbox and wait for the replies.

    Only the owner thread touches the engine, so the engine needs no lock. An interrupt or an exception strikes the
    caller alone: its call is left, and what it had not finished is aborted. The thread begins with a message and ends
    after IDLE seconds without one, so a program at rest has no thread of ours. An idle thread doesn't keep its engine
    alive.

    Args:
        engine: what is stepped.
        context: entered while there is work, such as the autocast setting that the engine was built under.
        release_when_idle: give the KV pool's memory back when no request is left.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        release_when_idle: bool = False,
    ) -> None:
        self.engine = engine
        self.release_when_idle = release_when_idle
        self._context = context
        self._inbox: Inbox = queue.SimpleQueue()
        self._owned = threading.Lock()  # held by the owner thread, from its begin to its end
        self._owner: threading.Thread | None = None  # while it does something
        self._has_work = False  # after the last step
        inbox = self._inbox
        self._reference = weakref.ref(self, lambda _: inbox.put(None))  # wakes an idle owner thread: it ends
        self._waiting: list[tuple[Callable[[], bool], Callable[[], None]]] = []  # what for, and what tells the caller
        self._due: list[Callable[[], None]] = []
        self._calls: dict[int, tuple[threading.Thread, Sequence[Request]]] = {}
        _all.add(self)

    # ---------------------------------------------------------------------------------------------------- for callers

    def call(self, requests: Sequence[Request]) -> Call:
        """One caller's requests, as a context manager: they are queued by the first wait, and none is left on exit.

        Raises:
            InvalidRequestError: a request could never be served; none of them was taken.
            UnsupportedCallError: it is called from a callback of the step that is under way.
        """
        if self.is_current:
            raise UnsupportedCallError(
                "generation was called from a callback (streamer, criterion, processor) of a running one"
            )
        for request in requests:
            self.engine.check_request(request)
        return Call(self, requests)

    def run(self, requests: Sequence[Request]) -> None:
        """Carry requests to their end.

        Raises:
            whatever ended one of the requests; the others are aborted.
        """
        with self.call(requests) as call:
            call.wait(lambda: all(r.finished for r in requests) or any(r.error for r in requests))
            raise_errors(requests)

    def abort(self, caller: threading.Thread | None = None) -> int:
        """Stop the calls that are under way, or those of one thread: they raise RequestAbortedError.

        Args:
            caller: the thread that called; None: all.

        Returns:
            How many calls.
        """
        chosen = [requests for thread, requests in list(self._calls.values()) if caller in (None, thread)]
        self.do(lambda: self._drop([request for requests in chosen for request in requests]))
        return len(chosen)

    def set_release_when_idle(self, release: bool) -> None:
        """Give the pool's memory back when no request is left (now, where there is none), or keep it."""
        self.release_when_idle = release
        if release:
            self.do(lambda: None)

    def close(self) -> None:
        """Close the engine between two steps; callers that are inside get RequestAbortedError.

        Waits until it is closed, unless it is called from a callback of a step: it is closed after that step then.
        """
        self.do(self.engine.close)

    def do(self, work: Callable[[], Any]) -> Any:
        """Do something to the engine between two steps. Returns and raises what it does.

        From a callback of a step it returns None at once, and is done after that step.
        """
        reply: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def message() -> None:
            outcome: tuple[Any, BaseException | None]
            try:
                outcome = work(), None
            except BaseException as error:
                outcome = None, error
            self._waiting.append((lambda: True, functools.partial(reply.put, outcome)))

        self.post(message)
        if self.is_current:
            return None
        result, error = self._result_of(reply)
        if error is not None:
            raise error
        return result

    def wait(self, done: Callable[[], bool], *, after: Callable[[], None] | None = None) -> None:
        """Have the owner thread do something, and wait until `done`, which it asks then and after each step."""
        # Each message wakes the owner thread, and it and the caller wait for the interpreter in turn: one is enough.
        reply: queue.SimpleQueue[None] = queue.SimpleQueue()

        def message() -> None:
            if after is not None:
                after()
            self._waiting.append((done, functools.partial(reply.put, None)))

        self.post(message)
        self._result_of(reply)

    def post(self, message: Callable[[], None]) -> None:
        """Have the owner thread do something between two steps, and don't wait for it."""
        self._inbox.put(message)
        self._ensure_owner()

    def _ensure_owner(self) -> None:
        # An owner that ends looks at its inbox once more after it let go of the lock, so no message is left there.
        if not self._owned.locked():
            _thread.start_new_thread(_begin, (self._reference, self._inbox, self._owned))

    def _result_of(self, reply: queue.SimpleQueue[T]) -> T:
        """Wait for a reply, and see now and then that there is an owner to give it."""
        while True:
            try:
                return reply.get(timeout=LOOKS)
            except queue.Empty:
                self._ensure_owner()

    def end(self) -> None:
        """End the owner thread after the step that it is in; a later message begins another."""
        self._inbox.put(None)
        if not self.is_current and self._owned.acquire(timeout=ENDS):
            self._owned.release()

    @property
    def busy(self) -> bool:
        """Whether a caller is inside."""
        return bool(self._calls)

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is the owner thread: it is in a callback of a step."""
        return self._owner is threading.current_thread()

    def enter(self, number: int, requests: Sequence[Request]) -> Callable[[], None]:
        """A caller comes with requests. Returns what has the owner thread take them."""
        self._calls[number] = threading.current_thread(), requests
        return functools.partial(self._take, requests, recorded(self.engine.model.spec.device))

    def leave(self, number: int, requests: Sequence[Request]) -> None:
        """A caller goes; what it leaves unfinished is aborted, and its blocks are free when this returns."""
        if not all(request.finished for request in requests):
            self.do(lambda: self._drop(requests))
        self._calls.pop(number, None)

    def forsake(self, number: int, requests: Sequence[Request]) -> None:
        """As `leave`, for a caller that was interrupted as it left; may run anywhere, so it doesn't wait."""
        if self._calls.pop(number, None) is not None:
            self._inbox.put(lambda: self._drop(requests))  # an owner thread with requests waits for messages

    # --------------------------------------------------------------------------------------------- in the owner thread

    def work(self, message: Callable[[], None]) -> None:
        """Carry out a message and those after it, and step the engine until nothing is left to do."""
        self._owner = threading.current_thread()
        try:
            with self._context(), torch.no_grad():
                message()
                self.landed()
                drive(self.engine, self)
        except BaseException as error:  # a fault of ours or of a plugin's scheduler: nobody may wait for ever
            logger.exception("a step failed, and with it every request that was under way")
            self.engine.fail(error)
            self.landed()
        finally:
            self._owner = None

    def read(self) -> bool:
        """Carry out the messages that are there. Whether there was one, or there is a step to make."""
        found = False
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                self._inbox.put(None)  # for `_serve`, which ends the thread
                return False
            message()
            found = True
        return found or self._has_work

    def landed(self) -> None:
        """Give the memory back where nobody needs it, and tell the callers whose requests are where they wait for."""
        if self.release_when_idle and self._inbox.empty():
            self.engine.release_memory()  # before anybody is told: who returns finds it given back
        self._has_work = self.engine.has_work
        waiting, self._waiting = self._waiting, []
        for done, tell in waiting:
            if done():
                self._due.append(tell)
            else:
                self._waiting.append((done, tell))
        if self._has_work:  # otherwise once this thread has let go of the engine: who returns may drop it
            for tell in self.take_due():
                tell()

    def take_due(self) -> list[Callable[[], None]]:
        """What tells the callers that are where they wait for; each is given once."""
        due, self._due = self._due, []
        return due

    def _take(self, requests: Sequence[Request], written: torch.cuda.Event | None) -> None:
        """Add a caller's requests, after what its stream had been given, such as new weights."""
        try:
            if written is not None:
                written.wait()
            self.engine.refresh()
        except BaseException as error:
            for request in requests:
                _fail(request, error)
        for request in requests:
            if not request.finished:
                try:
                    self.engine.add(request)
                except BaseException as error:
                    _fail(request, error)

    def _drop(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.abort(request)


class Call:
    """One caller's requests in an engine. Leaving it, by an exception too, aborts what is unfinished."""

    _numbers = itertools.count()

    def __init__(self, thread: EngineThread, requests: Sequence[Request]) -> None:
        self._thread = thread
        self._requests = requests
        self._number = next(self._numbers)
        self._next: Callable[[], None] | None = None  # what the owner thread does before the next wait

    def __enter__(self) -> Call:
        self._next = self._thread.enter(self._number, self._requests)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.leave(self._number, self._requests)

    def __del__(self) -> None:
        """An interrupt may strike as the call is entered or left: what is forgotten then goes with this object."""
        self._thread.forsake(self._number, self._requests)

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until `done`. The first wait queues the requests; one after `push` hands over what was pushed."""
        after, self._next = self._next, None
        self._thread.wait(done, after=after)

    def push(self, tokens: Sequence[tuple[Request, int, bool]]) -> None:
        """Give requests that await their tokens the next ones: (request, token, whether it ends the request)."""
        self._next = functools.partial(_push, self._thread.engine, tokens)


def raise_errors(requests: Sequence[Request]) -> None:
    """Raise what ended one of the requests, if anything did."""
    for request in requests:
        if request.error is not None:
            raise request.error


def _push(engine: Engine, tokens: Sequence[tuple[Request, int, bool]]) -> None:
    for request, token, stop in tokens:
        if not request.finished:
            engine.push(request, token, stop=stop)


def _fail(request: Request, error: BaseException) -> None:
    """End a request that the engine didn't take."""
    request.finish_reason, request.error, request.status = "error", error, Status.FINISHED


Inbox = queue.SimpleQueue["Callable[[], None] | None"]


def _begin(reference: weakref.ref[EngineThread], inbox: Inbox, owned: threading.Lock) -> None:
    """Start an owner thread from a thread that is nobody's.

    CPython may deliver an exception that is set for a thread to one that it is starting, which dies before it runs
    anything, and `Thread.start` waits for it for ever (PyThreadState_SetAsyncExc goes by an id that the new thread has
    from its parent at first).
    """
    threading.Thread(target=_own, args=(reference, inbox, owned), name="hf_paged engine", daemon=True).start()


def _own(reference: weakref.ref[EngineThread], inbox: Inbox, owned: threading.Lock) -> None:
    """An owner thread, from its begin to its end. Of several that begin at once, one stays."""
    while owned.acquire(blocking=False):
        try:
            _serve(reference, inbox)
        finally:
            owned.release()
        if inbox.empty() or reference() is None:
            return


def _serve(reference: weakref.ref[EngineThread], inbox: Inbox) -> None:
    """Do what the inbox says until it is silent. The EngineThread is held only while there is something to do."""
    while (thread := reference()) is not None:
        timeout = None if thread.engine.has_requests else IDLE
        del thread
        try:
            message = inbox.get(timeout=timeout)
        except queue.Empty:
            return
        if message is None or (thread := reference()) is None:
            return
        thread.work(message)
        due = thread.take_due()
        del thread, message
        for tell in due:
            tell()


_all: weakref.WeakSet[EngineThread] = weakref.WeakSet()
after_fork(_all.clear)


@atexit.register
def _end_all() -> None:
    """Before the interpreter is torn down, which a thread inside torch would not survive."""
    for thread in list(_all):
        thread.end()
