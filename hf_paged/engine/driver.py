"""The driver: who turns the crank. Callers share one batch, and one of them at a time steps the engine for all."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from hf_paged.engine.engine import Engine
from hf_paged.errors import UnsupportedCallError
from hf_paged.types import Request, Status

logger = logging.getLogger(__name__)


class Driver:
    """Lets any number of threads use one engine, without a thread of its own.

    The first caller in takes the driver's seat and steps the engine until its own requests are done. Callers that
    arrive meanwhile leave theirs in a mailbox and sleep; when the driver leaves, it rings one of them to take over.
    Only who sits in the seat touches the engine, so the engine needs no lock.

    An interrupt (Ctrl-C, or an exception set from another thread) may strike anywhere. So nothing is lost by being
    broken off: a message is read before it is taken from the mailbox, may be read twice, and the engine is marked
    broken while it is touched, so that whoever sits down next mends it first. Deques and simple queues are used, and
    no events, as those are atomic.

    Args:
        engine: what is driven.
        release_when_idle: give the KV pool's memory back when the last caller leaves.
    """

    def __init__(self, engine: Engine, *, release_when_idle: bool = False) -> None:
        self.engine = engine
        self.release_when_idle = release_when_idle
        self._lock = threading.Lock()  # guards the seat; nothing of a caller's runs under it
        self._seat: _Caller | None = None
        self._sleepers: list[_Caller] = []
        self._mail: deque[Callable[[], None]] = deque()
        self._inside: set[Call] = set()
        self._broken = False

    def call(self, requests: Sequence[Request]) -> Call:
        """One caller's stay, as a context manager: its requests are taken on entry, and gone on exit.

        Enter it twice (`with driver.call(requests) as call, call:`): an interrupt that strikes as one exit is entered
        keeps that one from doing anything.

        Raises:
            InvalidRequestError: a request could never be served; none of them was taken.
            UnsupportedCallError: it comes out of a callback of the step that is under way.
        """
        if self.driven_here:
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
        with self.call(requests) as call, call:
            call.wait(lambda: all(r.finished for r in requests) or any(r.error for r in requests))
            raise_errors(requests)

    def set_release_when_idle(self, release: bool) -> None:
        """Give the pool's memory back when the last caller leaves (now, where none is inside), or keep it."""
        self.release_when_idle = release
        self._sweep()

    def close(self, *, wait: bool = True) -> None:
        """Close the engine between two steps; callers that are inside get RequestAbortedError.

        Args:
            wait: until it is closed, however long the step takes that another thread is in. Who calls this from a
                callback of a step doesn't wait: the engine is closed after that step.
        """
        self.do(self.engine.close, wait=wait)

    def do(self, work: Callable[[], object], *, wait: bool = True) -> None:
        """Do something to the engine between two steps; see `close` for `wait`. What it raises is logged."""
        done: queue.SimpleQueue[None] = queue.SimpleQueue()

        def message() -> None:
            try:
                work()
            except Exception:
                done.put(None)
                raise
            done.put(None)

        self.post(message)
        self._sweep()
        if wait and not self.driven_here:
            done.get()

    @property
    def busy(self) -> bool:
        """Whether a caller is inside."""
        return bool(self._inside)

    @property
    def driven_here(self) -> bool:
        """Whether this thread sits in the driver's seat: it is in a callback of a step."""
        driver = self._seat
        return driver is not None and driver.thread == threading.get_ident()

    # ------------------------------------------------------------------------------------------------------------ calls

    def enter(self, call: Call, requests: Sequence[Request]) -> None:
        """A caller comes, with requests."""
        self._inside.add(call)
        self.post(lambda: self._take(requests))

    def leave(self, call: Call, requests: Sequence[Request]) -> None:
        """A caller goes; what it leaves unfinished is aborted. Does no harm when done twice."""
        self.post(lambda: self._drop(requests))
        self._inside.discard(call)
        self._sweep()

    def post(self, message: Callable[[], None]) -> None:
        """Have the driver do something between two steps; it is done twice if an interrupt breaks it off."""
        self._mail.append(message)
        driver = self._seat
        if driver is not None:
            driver.bell.put(None)

    def drive_until(self, done: Callable[[], bool]) -> None:
        """Step the engine, or sleep while another thread does, until `done`."""
        me = _Caller(done)
        try:
            self._sleepers.append(me)
            while not self._sit_down(me):
                if me.told:
                    return
                me.bell.get()
            self._steps(me)
        finally:
            try:
                self._surely_stand_up(me)
            finally:  # an interrupt may have kept that from doing anything
                self._surely_stand_up(me)

    # --------------------------------------------------------------------------------------------------------- the seat

    def _sit_down(self, me: _Caller) -> bool:
        """Take the driver's seat if it is free. Whether it is mine now."""
        with self._lock:
            if self._seat is None:
                self._seat = me
            return self._seat is me

    def _surely_stand_up(self, me: _Caller) -> None:
        try:
            self._stand_up(me)
        except BaseException:  # a second interrupt must not leave the seat taken by nobody
            self._stand_up(me)
            raise

    def _stand_up(self, me: _Caller) -> None:
        """Leave: the seat, if it is mine, and the sleepers. If the seat is free then, ring the next one."""
        with self._lock:
            if self._seat is me:
                self._seat = None
            if me in self._sleepers:
                self._sleepers.remove(me)
            if self._seat is None and self._sleepers:  # even if it wasn't mine: the bell may have rung for me
                self._sleepers[0].bell.put(None)

    def _sweep(self) -> None:
        """See to the mail if nobody sits in the seat, so that nothing of a caller is left when it is gone."""
        while True:
            me = _Caller(lambda: True)
            try:
                if not self._sit_down(me):
                    return  # the driver reads it
                self._steps(me)
                if self.release_when_idle and not self._inside:
                    self._touch(self.engine.release_memory)
            finally:
                try:
                    self._surely_stand_up(me)
                finally:
                    self._surely_stand_up(me)
            if not self._mail and not self._holds_idle_memory:  # else what came since would wait for the next caller
                return

    @property
    def _holds_idle_memory(self) -> bool:
        """Whether a pool that should be released is still held: the last caller left while this thread was driving."""
        return self.release_when_idle and not self._inside and self.engine.holds_memory

    # --------------------------------------------------------------------------------------------- what the driver does

    def _steps(self, me: _Caller) -> None:
        while True:
            self._read_mail()
            if me.done():
                return
            if self.engine.has_work:
                self._touch(self.engine.step)
                self._tell_done(me)
            else:  # every request waits for its caller, who will post
                self._tell_done(me)
                me.bell.get()

    def _touch(self, work: Callable[[], object]) -> None:
        """Do something to the engine; what was broken off before is mended first."""
        if self._broken:
            self.engine.recover()
        self._broken = True
        work()
        self._broken = False

    def _read_mail(self) -> None:
        if self._broken:
            self._touch(_nothing)
        while self._mail:
            try:
                self._touch(self._mail[0])
            except Exception:
                logger.exception("a message to the engine failed; it is dropped")
            self._mail.popleft()

    def _tell_done(self, me: _Caller) -> None:
        for sleeper in list(self._sleepers):
            if sleeper is not me and not sleeper.told and sleeper.done():
                sleeper.told = True
                sleeper.bell.put(None)

    def _take(self, requests: Sequence[Request]) -> None:
        try:
            self.engine.refresh()
        except Exception as error:
            for request in requests:
                _fail(request, error)
        for request in requests:
            if request.finished or self.engine.carries(request):  # this message was broken off before
                continue
            try:
                self.engine.add(request)
            except Exception as error:
                _fail(request, error)

    def _drop(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.abort(request)


class _Caller:
    """A thread that sleeps until it is told that it is done, or sits in the driver's seat.

    Attributes:
        done: whether it is; evaluated by the driver.
        told: whether the driver saw it done.
        thread: its id.
        bell: rung to wake it: by the driver when it is done or leaves, by others when they leave mail for it.
    """

    def __init__(self, done: Callable[[], bool]) -> None:
        self.done = done
        self.told = False
        self.thread = threading.get_ident()
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()


class Call:
    """One caller's stay with the driver. Leaving it, by an exception too, aborts what is unfinished."""

    def __init__(self, driver: Driver, requests: Sequence[Request]) -> None:
        self._driver = driver
        self._requests = requests
        self._unread: set[object] = set()
        self._entered = self._left = False

    def __enter__(self) -> Call:
        if self._entered:
            return self
        self._entered = True
        try:
            self._driver.enter(self, self._requests)
        except BaseException:
            self._surely_leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._surely_leave()

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait, and drive the engine meanwhile if nobody else does, until what was pushed is taken and `done`."""
        self._driver.drive_until(lambda: not self._unread and done())

    def push(self, tokens: Sequence[tuple[Request, int, bool]]) -> None:
        """Give held requests their next tokens: (request, token, whether it ends the request)."""
        pushed = [(request, len(request.token_ids), token, stop) for request, token, stop in tokens]

        def message() -> None:
            for request, length, token, stop in pushed:
                # Longer: this message was broken off after that token.
                if not request.finished and len(request.token_ids) == length:
                    self._driver.engine.push(request, token, stop=stop)
            self._unread.discard(message)

        self._unread.add(message)
        self._driver.post(message)

    def _surely_leave(self) -> None:
        if self._left:
            return
        try:
            self._driver.leave(self, self._requests)
        except BaseException:  # a second interrupt must not leave requests behind that nobody waits for
            self._driver.leave(self, self._requests)
            raise
        self._left = True


def raise_errors(requests: Sequence[Request]) -> None:
    """Raise what ended one of the requests, if anything did."""
    for request in requests:
        if request.error is not None:
            raise request.error


def _fail(request: Request, error: Exception) -> None:
    """End a request that the engine didn't take."""
    request.finish_reason, request.error, request.status = "error", error, Status.FINISHED


def _nothing() -> None:
    pass
