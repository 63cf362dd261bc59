"""The owner thread: one thread steps an engine, for callers in any number of others."""

from __future__ import annotations

import _thread
import atexit
import functools
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from hf_paged.engine.call import Call, raise_errors
from hf_paged.engine.engine import Engine
from hf_paged.engine.loop import drive
from hf_paged.engine.staging import on_device, recorded
from hf_paged.errors import RequestAbortedError, UnsupportedCallError
from hf_paged.forks import after_fork
from hf_paged.request import FinishReason, Request, Status

logger = logging.getLogger(__name__)
T = TypeVar("T")

IDLE = 5.0  # seconds without a message after which the thread ends
LOOKS = 1.0  # seconds after which a waiting caller looks whether there is an owner
ENDS = 60.0  # seconds that the interpreter's end waits for a step under way


class EngineThread:
    """Steps one engine in a thread of its own. Callers put messages into its inbox and wait for the replies.

    Only the owner thread touches the engine, so the engine needs no lock. An interrupt or an exception strikes the
    caller alone: its call is left, and what it had not finished is aborted. The thread begins with a message and ends
    after IDLE seconds without one, so a program at rest has no thread of ours. An idle thread doesn't keep its engine
    alive. A forked child has no owner and needs another EngineThread (`ModelEngines` builds one).

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
        self._waits = True
        self._waits_for: EngineThread | None = None  # in a callback of a step
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
            UnsupportedCallError: it is called from a callback of a step that would wait for itself.
        """
        if self._waits_for_caller:
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

        From a callback of a step that would wait for itself it returns None at once, and is done after that step.
        """
        reply: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def message() -> None:
            outcome: tuple[Any, BaseException | None]
            try:
                outcome = work(), None
            except BaseException as error:
                outcome = None, error
            self._waiting.append((lambda: True, functools.partial(reply.put, outcome)))
            del outcome  # an error's traceback holds this frame

        self.post(message)
        if self._waits_for_caller:
            return None
        result, error = self._result_of(reply)
        try:
            if error is not None:
                raise error
            return result
        finally:
            del error

    def wait(self, done: Callable[[], bool], *, after: Callable[[], None] | None = None) -> None:
        """Have the owner thread do something, and wait until `done`, which it asks then and after each step."""
        # Each message wakes the owner thread, and it and the caller wait for the interpreter in turn: one is enough.
        reply: queue.SimpleQueue[None] = queue.SimpleQueue()

        def message() -> None:
            self._waiting.append((done, functools.partial(reply.put, None)))
            if after is not None:
                after()

        self.post(message)
        self._result_of(reply)

    def post(self, message: Callable[[], None]) -> None:
        """Have the owner thread do something between two steps, and don't wait for it."""
        self._inbox.put(message)
        self._ensure_owner()

    def _ensure_owner(self) -> None:
        # An owner that ends looks at its inbox once more after it let go of the lock, so no message is left there.
        if self._owned.locked():
            return
        try:
            _thread.start_new_thread(_begin, (self._reference, self._inbox, self._owned))
        except RuntimeError:  # too many threads, or the main thread has ended: the caller is the owner for a while
            _own(self._reference, self._inbox, self._owned, idle=0.0)

    def _result_of(self, reply: queue.SimpleQueue[T]) -> T:
        """Wait for a reply, and see now and then that there is an owner to give it."""
        mine: EngineThread | None = getattr(_here, "thread", None)
        if mine is not None:
            mine._waits_for = self
        try:
            if self._waits_for_caller:  # since `call` looked: two callbacks that began to wait at once
                raise UnsupportedCallError("callbacks of two engines' steps wait for each other")
            while True:
                try:
                    return reply.get(timeout=LOOKS)
                except queue.Empty:
                    self._ensure_owner()
        finally:
            if mine is not None:
                mine._waits_for = None

    @property
    def _waits_for_caller(self) -> bool:
        """Whether the calling thread is this owner, or one that this owner waits for, through others or not."""
        mine: EngineThread | None = getattr(_here, "thread", None)
        if mine is None:
            return False
        thread: EngineThread | None = self
        while thread is not None and thread is not mine:
            thread = thread._waits_for
        return thread is mine

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
        written = recorded(self.engine.model.spec.device)
        return functools.partial(self._take, requests, written, torch.get_num_threads())

    def leave(self, number: int, requests: Sequence[Request]) -> None:
        """A caller goes; what it leaves unfinished is aborted, and its blocks are free when this returns."""
        if not all(request.finished for request in requests):
            self.do(lambda: self._drop(requests))
        self._calls.pop(number, None)

    def forsake(self, number: int, requests: Sequence[Request]) -> None:
        """As `leave`, for a caller that was interrupted as it left; may run anywhere, so it doesn't wait."""
        if self._calls.pop(number, None) is not None:
            self._inbox.put(lambda: self._drop(requests))  # no owner is started: one that has requests doesn't end

    # --------------------------------------------------------------------------------------------- in the owner thread

    def work(self, message: Callable[[], None], *, waits: bool) -> None:
        """Carry out a message and those after it, and step the engine until nothing is left to do.

        Args:
            waits: whether to wait for messages while requests await their tokens.
        """
        self._waits, before = waits, getattr(_here, "thread", None)
        self._owner, _here.thread = threading.current_thread(), self
        try:
            # Until no request is left: an autocast context forgets the casts of the weights as it is left.
            with on_device(self.engine.model.spec.device), self._context(), torch.no_grad():
                message()
                self.landed()
                drive(self.engine, self)
        except (
            BaseException
        ) as error:  # a bug, maybe in a plugin's scheduler: end every request, so that no caller hangs
            logger.exception("a step failed, and with it every request that was under way")
            self.engine.fail(error)
            self.landed()
        finally:
            self._owner, _here.thread = None, before

    def read(self) -> bool:
        """Carry out the messages that are there. Whether there was one, or there is a step to make.

        Waits for a message where every request awaits its token.
        """
        found = False
        while not self._inbox.empty() or (self._waits and self.engine.has_requests and not (found or self._has_work)):
            message = self._inbox.get()
            if message is None:
                self._inbox.put(None)  # for `_serve`, which ends the thread
                return False
            self._tell_due()  # they don't wait for this message too
            message()
            found = True
            del message
        return found or self._has_work

    def landed(self) -> None:
        """Release idle memory, and find the callers whose wait is over."""
        if self.release_when_idle and self._inbox.empty():
            self.engine.release_memory()  # before a caller is told, so that it finds the memory released
        self._has_work = self.engine.has_work
        waiting, self._waiting = self._waiting, []
        for done, tell in waiting:
            if _is_true(done):
                self._due.append(tell)
            else:
                self._waiting.append((done, tell))
        if self.engine.has_requests:  # otherwise `_serve` tells them, once it holds no engine
            self._tell_due()

    def _tell_due(self) -> None:
        for tell in self.take_due():
            tell()

    def take_due(self) -> list[Callable[[], None]]:
        """What tells the callers that are where they wait for; each is given once."""
        due, self._due = self._due, []
        return due

    def _take(self, requests: Sequence[Request], written: torch.cuda.Event | None, num_threads: int) -> None:
        """Add a caller's requests, after what its stream had been given, such as new weights.

        Args:
            written: recorded on the caller's stream.
            num_threads: of the caller's operators on a CPU: torch counts them for each thread.
        """
        try:
            if num_threads != torch.get_num_threads():
                torch.set_num_threads(num_threads)
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
            if not request.finished:  # its caller hasn't queued it yet
                _fail(request, RequestAbortedError(f"request {request.request_id!r} was aborted"), "abort")


def _fail(request: Request, error: BaseException, reason: FinishReason = "error") -> None:
    """End a request that the engine didn't take."""
    request.finish_reason, request.error, request.status = reason, error, Status.FINISHED


def _is_true(done: Callable[[], bool]) -> bool:
    try:
        return done()
    except BaseException:
        logger.exception("what a caller waits for can't be asked")
        return True


def _nothing() -> None:
    pass


_here = threading.local()  # `thread`: the EngineThread whose owner the thread is, while it does something


Inbox = queue.SimpleQueue["Callable[[], None] | None"]


def _begin(reference: weakref.ref[EngineThread], inbox: Inbox, owned: threading.Lock) -> None:
    """Start an owner thread, from a helper thread that no exception is aimed at.

    CPython may deliver an exception that is set for a thread to one that it is starting, which dies before it runs
    anything, and `Thread.start` waits for it for ever (PyThreadState_SetAsyncExc goes by an id that the new thread has
    from its parent at first).
    """
    arguments = (reference, inbox, owned)
    try:
        threading.Thread(target=_own, args=arguments, name="hf_paged engine", daemon=True).start()
    except RuntimeError:  # one thread too many
        _own(*arguments)


def _own(reference: weakref.ref[EngineThread], inbox: Inbox, owned: threading.Lock, idle: float | None = None) -> None:
    """An owner thread, from its begin to its end. Of several that begin at once, one stays.

    Args:
        idle: seconds without a message after which it ends; None: IDLE.
    """
    while owned.acquire(blocking=False):
        try:
            _serve(reference, inbox, IDLE if idle is None else idle)
        finally:
            owned.release()
        if inbox.empty() or reference() is None:
            return


def _serve(reference: weakref.ref[EngineThread], inbox: Inbox, idle: float) -> None:
    """Do what the inbox says until it is silent. The EngineThread is held only while there is something to do."""
    message: Callable[[], None] | None = _nothing  # there may be a step to make, which an owner before has left
    while message is not None and (thread := reference()) is not None:
        thread.work(message, waits=idle > 0)
        due = thread.take_due()
        del thread, message
        while due:
            due.pop()()
        try:
            message = inbox.get(timeout=idle)
        except queue.Empty:
            return


_all: weakref.WeakSet[EngineThread] = weakref.WeakSet()
after_fork(_all.clear)


@atexit.register
def _end_all() -> None:
    """Before the interpreter is torn down, which a thread inside torch would not survive."""
    for thread in list(_all):
        thread.end()
