"""The owner thread: many callers, one engine; who fails or is interrupted takes nobody along."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import faulthandler
import gc
import pathlib
import random
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from engine import fake

from hf_paged.engine import thread as threads
from hf_paged.engine.call import Call
from hf_paged.engine.thread import EngineThread
from hf_paged.errors import EngineClosedError, InvalidRequestError, RequestAbortedError, UnsupportedCallError

pytestmark = pytest.mark.usefixtures("both_paces")

HANGS = 120  # seconds after which a test is taken to hang; every thread's stack is printed then


class Interrupt(KeyboardInterrupt):
    """Told apart from a person's Ctrl-C."""


class Oops(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_hang(monkeypatch):
    """Print where everyone is, rather than hang; and let threads meet in as many places as they can."""
    faulthandler.dump_traceback_later(HANGS, exit=True)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
    faulthandler.cancel_dump_traceback_later()


def in_threads(*works):
    """Run functions at once, a thread each. What each returned or raised, in order."""
    results = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def call(index, work):
        try:
            barrier.wait()
            results[index] = work()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=pair, daemon=True) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS)
        assert not thread.is_alive()
    return results


def run(thread, *requests):
    thread.run(requests)
    return [request.output_token_ids for request in requests]


def roomy(**options):
    """An engine in which a request can be `endless`: its caller is always there before its end."""
    return EngineThread(fake.make_engine(num_blocks=4000, **options))


def endless(prompt, **fields):
    return fake.make_request(prompt, 9000, **fields)


def right(*requests, windows=fake.FULL):
    return [fake.expected(r.prompt_token_ids, r.params.max_tokens, windows) for r in requests]


def some_requests(seed, **fields):
    pick = random.Random(seed)
    prompts = [[pick.randint(0, 3) for _ in range(pick.randint(1, 14))] for _ in range(pick.randint(1, 3))]
    return [fake.make_request(prompt, pick.randint(1, 10), **fields) for prompt in prompts]


# -------------------------------------------------------------------------------------------------------- one caller


def test_one_caller():
    thread = EngineThread(fake.make_engine())
    requests = some_requests(0)
    assert run(thread, *requests) == right(*requests)
    fake.assert_empty(thread.engine)


def test_impossible_requests_are_refused_before_any_work():
    thread = EngineThread(fake.make_engine())
    good, bad = fake.make_request([1, 2]), fake.make_request([])
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        thread.run([good, bad])
    assert thread.engine.model.num_tokens == []
    fake.assert_empty(thread.engine)


def test_an_id_that_is_taken_fails_the_newcomer_alone():
    thread = EngineThread(fake.make_engine())
    first = fake.make_request([1, 2, 3], 6, name="same", sampler=(hold := fake.Hold()))
    with thread.call([first]) as call:
        call.wait(lambda: first.held)
        with pytest.raises(InvalidRequestError, match="'same' is taken"):
            thread.run([fake.make_request([4, 5], name="same")])
        call.push([(first, int(hold.logits[first].argmax()), True)])
        call.wait(lambda: first.finished)
    assert first.output_token_ids == right(first)[0][:1]


def test_what_ends_a_request_is_raised_and_its_neighbours_are_aborted():
    thread = roomy()

    def fail(request):
        raise Oops

    long, failing = endless([1, 2, 3]), fake.make_request([1, 2], 40, on_token=fail)
    with pytest.raises(Oops):
        thread.run([long, failing])
    assert long.finish_reason == "abort"
    fake.assert_empty(thread.engine)


def test_leaving_early_aborts():
    thread = roomy()
    request = endless([1, 2, 3])
    with thread.call([request]) as call:
        call.wait(lambda: request.num_output >= 3)
    assert request.finish_reason == "abort"
    assert isinstance(request.error, RequestAbortedError)
    fake.assert_empty(thread.engine)


def test_memory_is_given_back_when_the_last_caller_leaves():
    thread = EngineThread(fake.make_engine(num_blocks=None), release_when_idle=True)
    outer, inner = fake.make_request([1, 2, 3], 6, sampler=fake.Hold()), fake.make_request([1, 2, 3, 4], 6)
    with thread.call([outer]) as call:
        call.wait(lambda: outer.held)
        assert [run(thread, inner)] == [right(inner)]
        assert thread.engine.stats.pool_bytes > 0
    assert thread.engine.stats.pool_bytes == 0
    assert run(thread, again := fake.make_request([1, 2, 3], 6)) == right(again)


def test_memory_is_given_back_by_the_time_that_a_caller_leaves():
    thread = roomy()
    thread.release_when_idle = True
    for number in range(50):
        with thread.call([request := endless([1, 2])]) as call:
            call.wait(lambda request=request: request.num_output > number % 3)
        assert thread.engine.stats.pool_bytes == 0
    thread.run([fake.make_request([1, 2])])
    assert thread.engine.stats.pool_bytes == 0


def test_memory_is_kept_where_it_should_be():
    thread = EngineThread(fake.make_engine())
    thread.run([fake.make_request(range(9), 6)])
    thread.run([again := fake.make_request(range(9), 6)])
    assert again.num_cached == 8


def test_new_weights_are_noticed_between_two_calls():
    thread = EngineThread(fake.make_engine())
    first, second = fake.make_request(range(9)), fake.make_request(range(9))
    run(thread, first)
    thread.engine.model.salt = 1
    assert run(thread, second)[0] == fake.expected(range(9), 8, salt=1)
    assert second.num_cached == 0


def test_closing():
    thread = roomy()
    request = endless([1, 2])
    with thread.call([request]) as call:
        call.wait(lambda: request.num_output > 0)
        thread.close()
        call.wait(lambda: request.finished)
    assert isinstance(request.error, RequestAbortedError)
    with pytest.raises(EngineClosedError):
        thread.run([fake.make_request([1, 2])])


def test_calling_from_a_callback_is_refused_rather_than_hanging():
    thread = EngineThread(fake.make_engine())
    outer = fake.make_request([1, 2], on_token=lambda request: thread.run([fake.make_request([3])]))
    with pytest.raises(UnsupportedCallError, match="callback"):
        thread.run([outer])
    fake.assert_empty(thread.engine)


# ------------------------------------------------------------------------------------------------- interrupts, in place


@pytest.mark.parametrize("where", ["on_token", "stop_check", "sampler", "forward", "refresh", "schedule"])
def test_an_interrupt_that_a_callback_raises_leaves_an_engine_that_works(where):
    """It concerns the caller; where no request is at fault, all that were under way."""
    engine = fake.make_engine()
    thread = EngineThread(engine)
    request = fake.make_request([1, 2, 3], 6)

    def strike(*_):
        if request.num_output >= (where != "sampler"):
            raise Interrupt

    schedule = engine.scheduler.schedule
    if where == "sampler":
        request.sampler = type("Struck", (), {"sample": strike})()
    elif where == "forward":
        engine.model.before = strike
    elif where == "refresh":
        engine.model.fingerprint = lambda: exec("raise KeyboardInterrupt")
    elif where == "schedule":
        engine.scheduler.schedule = lambda: strike() or schedule()
    else:
        setattr(request, where, strike)
    with pytest.raises(KeyboardInterrupt):
        thread.run([request])
    engine.model.before, engine.scheduler.schedule = None, schedule
    engine.model.__dict__.pop("fingerprint", None)
    assert request.finish_reason == "error"
    after = some_requests(1)
    assert run(thread, *after) == right(*after)
    fake.assert_empty(engine)


def interrupt(thread):
    """Have a thread raise Interrupt as soon as it runs again."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt))


def test_an_interrupted_caller_takes_nobody_along():
    """It is struck while it waits: its requests go, those of others don't notice."""
    thread = roomy()
    mine, other = endless([1, 2]), fake.make_request([3, 4], 90)
    results, caller = [], None

    def strike(request):
        if request.num_output == 3:
            interrupt(caller)

    mine.on_token = strike

    def call():
        try:
            with thread.call([mine]) as call:
                call.wait(lambda: mine.num_output > 3)
        except Interrupt as error:
            results.append(type(error))

    caller = threading.Thread(target=call)
    with thread.call([other]) as held:
        caller.start()
        caller.join(HANGS)
        assert results == [Interrupt]
        assert mine.finish_reason == "abort"
        held.wait(lambda: other.finished)
    assert [other.output_token_ids] == right(other)
    fake.assert_empty(thread.engine)


# -------------------------------------------------------------------------------------------- the thread comes and goes


def alive():
    return [t for t in threading.enumerate() if t.name == "hf_paged engine"]


def test_it_begins_with_a_request_and_ends_when_idle(monkeypatch):
    monkeypatch.setattr(threads, "IDLE", 0.01)
    before = set(alive())
    thread = EngineThread(fake.make_engine())
    assert not {*alive()} - before
    for seed in range(3):
        requests = some_requests(seed)
        assert run(thread, *requests) == right(*requests)
        while thread._owned.locked():
            pass
    for ended in {*alive()} - before:
        ended.join(HANGS)
    assert not {*alive()} - before


def test_it_stays_while_a_request_awaits_its_token(monkeypatch):
    """Its caller may take long, and may be interrupted then."""
    monkeypatch.setattr(threads, "IDLE", 0.01)
    thread, hold = EngineThread(fake.make_engine()), fake.Hold()
    request = fake.make_request([1, 2], 5, sampler=hold)
    with thread.call([request]) as call:
        call.wait(lambda: request.held)
        time.sleep(0.1)
        assert thread._owned.locked()
    fake.assert_empty(thread.engine)


def test_an_idle_thread_keeps_no_engine_alive():
    thread = EngineThread(fake.make_engine())
    run(thread, *some_requests(0))
    engine, owners = weakref.ref(thread.engine), alive()
    del thread
    for owner in owners:
        owner.join(HANGS)
    assert engine() is None


def test_ended_it_begins_again_with_the_next_request():
    thread = EngineThread(fake.make_engine())
    for seed in range(5):
        requests = some_requests(seed)
        assert run(thread, *requests) == right(*requests)
        thread.end()
        assert not thread._owned.locked()


def test_ended_in_the_middle_of_a_call():
    """As at the interpreter's end. A message that comes all the same finds the engine as it was."""
    thread = EngineThread(fake.make_engine())
    request = fake.make_request([1, 2], 60)
    with thread.call([request]) as call:
        call.wait(lambda: request.num_output > 3)
        thread.end()
        call.wait(lambda: request.finished)
    assert [request.output_token_ids] == right(request)


def test_a_program_ends_while_a_thread_generates():
    """It is joined before the interpreter is torn down."""
    program = """
import threading, time
from engine import fake
from hf_paged.engine.thread import EngineThread
thread = EngineThread(fake.make_engine(num_blocks=4000))
request = fake.make_request([1, 2], 9000)
threading.Thread(target=lambda: thread.run([request]), daemon=True).start()
while request.num_output < 5:
    time.sleep(0.001)
print("the end")
"""
    where = pathlib.Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", program], cwd=where, timeout=HANGS, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "the end\n")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("where", ["start_new_thread", "Thread"])
def test_where_no_thread_can_be_started(monkeypatch, where):
    """At the limit of threads, or once the main thread has ended: the caller, or the helper, is the owner."""

    def start(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(*((_thread, where) if where != "Thread" else (threads.threading.Thread, "start")), start)
    thread = EngineThread(fake.make_engine())
    for seed in range(3):
        requests = some_requests(seed)
        assert run(thread, *requests) == right(*requests)
    assert push_all(thread, 5) == [fake.expected([5], 5), fake.expected([6], 5)]
    assert not thread.busy
    fake.assert_empty(thread.engine)


@pytest.mark.parametrize("where", ["finished", "restart", "done", "push"])
def test_nobody_waits_for_ever(where):
    """Whatever raises in the owner thread, the callers hear of it."""
    thread, hold = EngineThread(fake.make_engine()), fake.Hold()
    request = fake.make_request([1, 2], 6, sampler=hold)

    def fail(*_):
        raise SystemExit("no more")

    with thread.call([request]) as call:
        call.wait(lambda: request.held)
        if where == "done":
            call.wait(fail)
            return
        if where == "finished":
            thread.engine.outputs._told_finished = fail
        elif where == "restart":
            thread.engine.scheduler.restart = thread.engine.scheduler.schedule = lambda *_: 1 / 0
        else:
            thread.engine.push = fail
        call.push([(request, 3, where == "finished")])
        call.wait(lambda: request.finished)
    assert request.finished
    assert thread.engine.closed == (where == "restart")


def test_an_owner_that_ends_leaves_no_caller_behind(monkeypatch):
    monkeypatch.setattr(threads, "LOOKS", 0.01)
    thread = roomy()
    request = endless([1, 2])
    with thread.call([request]) as call:
        ender = threading.Thread(target=lambda: (time.sleep(0.1), thread.end()))
        ender.start()
        call.wait(lambda: request.num_output > 300 and not ender.is_alive())
    fake.assert_empty(thread.engine)


def test_callbacks_of_two_engines_that_call_each_other():
    """Each would wait for the other: refused, where a call of another engine alone is served."""
    first, second = EngineThread(fake.make_engine()), EngineThread(fake.make_engine())
    inner = fake.make_request([5], on_token=lambda _: first.run([fake.make_request([6])]))
    with pytest.raises(UnsupportedCallError):
        first.run([fake.make_request([1], on_token=lambda _: second.run([inner]))])
    answers = []
    asks = lambda request: answers.append(run(second, fake.make_request([request.num_output], 3)))  # noqa: E731
    first.run([fake.make_request([1, 2], 4, on_token=asks)])
    assert answers == [[fake.expected([count], 3)] for count in range(1, 5)]


def test_a_call_is_aborted_before_its_first_wait():
    thread = EngineThread(fake.make_engine())
    request = fake.make_request([1, 2], 6)
    with thread.call([request]) as call:
        assert thread.abort() == 1
        call.wait(lambda: request.finished)
    assert (request.finish_reason, request.num_output) == ("abort", 0)
    assert isinstance(request.error, RequestAbortedError)


def test_a_caller_is_told_before_the_next_message_is_read():
    thread, told = EngineThread(fake.make_engine()), []
    reply = threading.Event()
    request = fake.make_request([1, 2], 3, on_token=lambda _: reply.set() or time.sleep(0.01))

    def long(seconds=0.5):
        time.sleep(seconds)
        told.append("the message")

    def call():
        thread.run([request])
        told.append("the caller")

    caller = threading.Thread(target=call)
    caller.start()
    reply.wait(HANGS)
    thread.do(long)
    caller.join(HANGS)
    assert sorted(told) == ["the caller", "the message"]


def test_the_context_is_kept_from_token_to_token():
    """Leaving an autocast context forgets the casts of the weights."""
    entered = []

    @contextmanager
    def context():
        entered.append(1)
        yield

    thread = EngineThread(fake.make_engine(), context=context)
    push_all(thread, 12)
    assert len(entered) <= 3


def test_an_error_keeps_nothing_alive():
    gc.disable()
    try:
        thread = EngineThread(fake.make_engine())
        engine = weakref.ref(thread.engine)

        def work():
            raise Oops

        with contextlib.suppress(Oops):
            thread.do(work)
        run(thread, fake.make_request([1], 2))
        del thread
        until = time.monotonic() + HANGS
        while engine() is not None and time.monotonic() < until:
            time.sleep(0.01)
        assert engine() is None
    finally:
        gc.enable()


def test_an_owner_that_never_comes_is_replaced(monkeypatch):
    """As one that an interrupt, meant for the thread that starts it, strikes before it runs anything."""
    monkeypatch.setattr(threads, "LOOKS", 0.01)
    begin, lost = threads._begin, []

    def begin_late(*arguments):
        if len(lost) < 2:
            lost.append(arguments)
        else:
            begin(*arguments)

    monkeypatch.setattr(threads, "_begin", begin_late)
    requests = some_requests(0)
    assert run(EngineThread(fake.make_engine()), *requests) == right(*requests)
    assert len(lost) == 2


# ------------------------------------------------------------------------------------------------------------- aborting


@pytest.mark.parametrize("one", [True, False])
def test_a_call_is_stopped_from_another_thread(one):
    thread = roomy()
    long = [endless([index]) for index in range(2)]
    results = {}

    def call(request):
        try:
            run(thread, request)
        except RequestAbortedError as error:
            results[request] = error

    callers = [threading.Thread(target=call, args=(request,)) for request in long]
    for caller in callers:
        caller.start()
    thread.wait(lambda: all(request.num_output > 2 for request in long))
    assert thread.abort(callers[0] if one else None) == (1 if one else 2)
    callers[0].join(HANGS)
    assert long[0] in results
    if one:
        assert long[1] not in results
        assert thread.abort(callers[1]) == 1
    callers[1].join(HANGS)
    assert set(results) == set(long)
    assert thread.abort() == 0
    fake.assert_empty(thread.engine)


# ------------------------------------------------------------------------------------------------------ many callers


def test_many_callers_meet_in_one_batch():
    thread = EngineThread(fake.make_engine(max_num_batched_tokens=64, num_blocks=256))
    calls = [some_requests(seed) for seed in range(64)]
    results = in_threads(*[lambda call=call: run(thread, *call) for call in calls])
    assert results == [right(*call) for call in calls]
    fake.assert_empty(thread.engine)
    assert max(thread.engine.model.num_tokens) > 16


def test_calls_of_very_different_lengths():
    thread = EngineThread(fake.make_engine())
    calls = [fake.make_request([index], 1 + 3 * index) for index in range(20)]
    results = in_threads(*[lambda call=call: run(thread, call) for call in calls])
    assert results == [right(call) for call in calls]
    fake.assert_empty(thread.engine)


def push_all(thread, count):
    """One caller's two requests, whose tokens it chooses itself, both at a time."""
    hold = fake.Hold()
    requests = [fake.make_request([token], 50, sampler=hold) for token in (count, count + 1)]
    with thread.call(requests) as call:
        for number in range(count):
            call.wait(lambda: all(request.held for request in requests))
            assert [request.num_output for request in requests] == [number, number]
            call.push([(r, int(hold.logits[r].argmax()), number == count - 1) for r in requests])
        call.wait(lambda: all(request.finished for request in requests))
    return [request.output_token_ids for request in requests]


def test_callers_that_choose_their_own_tokens():
    """What was pushed is taken with the wait that follows."""
    thread = EngineThread(fake.make_engine(num_blocks=24))
    results = in_threads(*[lambda count=count: push_all(thread, count) for count in range(1, 17)])
    assert results == [[fake.expected([c], c), fake.expected([c + 1], c)] for c in range(1, 17)]
    fake.assert_empty(thread.engine)


class Raising:
    def sample(self, requests, logits):
        raise Oops


class Striker:
    """Interrupts callers from outside, each at most once, whenever the model is called."""

    def __init__(self, seed, chance):
        self.pick, self.chance = random.Random(seed), chance
        self.lock = threading.Lock()
        self.inside, self.struck = set(), set()

    def __call__(self, batch):
        if self.pick.random() < self.chance:
            with self.lock:
                chosen = self.pick.choice(sorted(self.inside - self.struck) or [None])
                if chosen is not None:
                    self.struck.add(chosen)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(chosen), ctypes.py_object(Interrupt))

    def exposed(self, work):
        """Run while it can be struck."""

        def call():
            with self.lock:
                self.inside.add(threading.get_ident())
            try:
                return work()
            finally:
                with self.lock:
                    self.inside.discard(threading.get_ident())

        return call


def troubled(index):
    """A caller's requests; every third caller's raise somewhere."""
    pick = random.Random(index)
    requests = some_requests(index)
    victim, trouble = pick.choice(requests), index % 9

    def fail(request):
        if request.num_output >= 1:
            raise Oops

    if trouble == 0:
        victim.on_token = fail
    elif trouble == 3:
        victim.stop_check = fail
    elif trouble == 6:
        victim.sampler = Raising()
    elif trouble == 8:
        victim.prompt_token_ids[-1] = victim.token_ids[-1] = fake.VOCAB - 1  # poisons the forward
    return requests


@pytest.mark.parametrize(
    "where", [(Call, "__enter__"), (Call, "__exit__"), (EngineThread, "leave"), (EngineThread, "do")]
)
@pytest.mark.parametrize("late", [False, True], ids=["as it begins", "as it ends"])
def test_an_interrupt_strikes_as_a_call_is_entered_or_left(monkeypatch, where, late):
    """No statement in a function can catch what strikes as it is called."""
    thread = roomy()
    thread.release_when_idle, engine = True, thread.engine
    struck = []
    method = getattr(*where)

    def strike(*arguments):
        if struck:
            return method(*arguments)
        struck.append(1)
        if late:
            method(*arguments)
        raise Interrupt

    monkeypatch.setattr(*where, strike)
    with pytest.raises(Interrupt), thread.call([endless([1, 2])]):
        pass
    gc.collect()
    assert not thread.busy
    thread.do(lambda: None)  # what was posted before is done
    fake.assert_empty(engine)
    assert engine.stats.pool_bytes == 0
    again = some_requests(0)
    assert run(thread, *again) == right(*again)


@pytest.mark.parametrize("windows", [fake.FULL, fake.BOTH], ids=["full", "both"])
@pytest.mark.parametrize("seed", range(4))
def test_64_callers_some_raising_some_interrupted(seed, windows):
    engine = fake.make_engine(windows, num_blocks=40, max_num_batched_tokens=32)
    engine.model.poison = fake.VOCAB - 1
    engine.model.before = striker = Striker(seed, 0.1)
    thread = EngineThread(engine, release_when_idle=seed % 2 == 1)
    calls = [troubled(64 * seed + index) for index in range(64)]
    results = in_threads(*[striker.exposed(lambda call=call: run(thread, *call)) for call in calls])

    interrupted = sum(isinstance(result, Interrupt) for result in results)
    assert 0 < interrupted < 40
    for index, (call, result) in enumerate(zip(calls, results, strict=True)):
        if isinstance(result, Interrupt):
            continue
        if isinstance(result, RuntimeError):
            assert "poisoned" in str(result)
            assert any(fake.VOCAB - 1 in request.token_ids for request in call)
        elif (64 * seed + index) % 9 in (0, 3, 6):
            assert isinstance(result, Oops)
        else:
            assert result == right(*call, windows=windows)
    fake.assert_empty(engine)
    assert engine.stats.pool_bytes == 0 or not thread.release_when_idle
    engine.model.before = None
    after = some_requests(5)
    assert run(thread, *after) == right(*after, windows=windows)


def test_a_failing_forward_concerns_the_request_at_fault():
    engine = fake.make_engine()
    engine.model.poison = fake.VOCAB - 1
    thread = EngineThread(engine)
    calls = [fake.make_request([index, fake.VOCAB - 1 if index == 5 else 7, 1], 6) for index in range(12)]
    results = in_threads(*[lambda call=call: run(thread, call) for call in calls])
    for index, (call, result) in enumerate(zip(calls, results, strict=True)):
        if index == 5:
            assert "poisoned" in str(result)
        else:
            assert result == right(call)
    fake.assert_empty(engine)


def test_one_caller_may_be_in_inference_mode():
    """What is made under one caller's inference mode can be written under another's ordinary mode."""
    thread = EngineThread(fake.make_engine())
    with torch.inference_mode():
        run(thread, fake.make_request([1, 2, 3]))
    request = fake.make_request([1, 2, 3, 4, 5, 6, 7], 30)
    assert run(thread, request) == right(request)
