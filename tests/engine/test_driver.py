"""The driver: many callers, one engine; whoever fails or is interrupted takes nobody along."""

from __future__ import annotations

import ctypes
import faulthandler
import random
import sys
import threading

import pytest
import torch
from engine import fake

from hf_paged.engine.driver import Call, Driver
from hf_paged.errors import EngineClosedError, InvalidRequestError, RequestAbortedError, UnsupportedCallError
from hf_paged.types import Sampled

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


def run(driver, *requests):
    driver.run(requests)
    return [request.output_token_ids for request in requests]


def right(*requests, windows=fake.FULL):
    return [fake.expected(r.prompt_token_ids, r.params.max_tokens, windows) for r in requests]


def some_requests(seed, **fields):
    pick = random.Random(seed)
    prompts = [[pick.randint(0, 3) for _ in range(pick.randint(1, 14))] for _ in range(pick.randint(1, 3))]
    return [fake.make_request(prompt, pick.randint(1, 10), **fields) for prompt in prompts]


# -------------------------------------------------------------------------------------------------------- one caller


def test_one_caller():
    driver = Driver(fake.make_engine())
    requests = some_requests(0)
    assert run(driver, *requests) == right(*requests)
    fake.assert_empty(driver.engine)


def test_impossible_requests_are_refused_before_any_work():
    driver = Driver(fake.make_engine())
    good, bad = fake.make_request([1, 2]), fake.make_request([])
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        driver.run([good, bad])
    assert driver.engine.model.num_tokens == []
    fake.assert_empty(driver.engine)


def test_an_id_that_is_taken_fails_the_newcomer_alone():
    driver = Driver(fake.make_engine())
    first = fake.make_request([1, 2, 3], 6, name="same")
    with driver.call([first]) as call:
        call.wait(lambda: first.num_output > 0)
        with pytest.raises(InvalidRequestError, match="'same' is taken"):
            driver.run([fake.make_request([4, 5], name="same")])
        call.wait(lambda: first.finished)
    assert [first.output_token_ids] == right(first)


def test_what_ends_a_request_is_raised_and_its_neighbours_are_aborted():
    driver = Driver(fake.make_engine())

    def fail(request):
        raise Oops

    long, failing = fake.make_request([1, 2, 3], 40), fake.make_request([1, 2], 40, on_token=fail)
    with pytest.raises(Oops):
        driver.run([long, failing])
    assert long.finish_reason == "abort"
    fake.assert_empty(driver.engine)


def test_leaving_early_aborts():
    driver = Driver(fake.make_engine())
    request = fake.make_request([1, 2, 3], 40)
    with driver.call([request]) as call:
        call.wait(lambda: request.num_output >= 3)
    assert request.finish_reason == "abort"
    assert isinstance(request.error, RequestAbortedError)
    fake.assert_empty(driver.engine)


def test_memory_is_given_back_when_the_last_caller_leaves():
    driver = Driver(fake.make_engine(num_blocks=None), release_when_idle=True)
    outer, inner = fake.make_request([1, 2, 3], 6), fake.make_request([1, 2, 3, 4], 6)
    with driver.call([outer]) as call:
        assert [run(driver, inner)] == [right(inner)]
        assert driver.engine.stats.pool_bytes > 0
        call.wait(lambda: outer.finished)
    assert driver.engine.stats.pool_bytes == 0
    assert run(driver, again := fake.make_request([1, 2, 3], 6)) == right(again)


def test_memory_is_kept_where_it_should_be():
    driver = Driver(fake.make_engine())
    driver.run([fake.make_request(range(9), 6)])
    driver.run([again := fake.make_request(range(9), 6)])
    assert again.num_cached == 8


def test_new_weights_are_noticed_between_two_calls():
    driver = Driver(fake.make_engine())
    first, second = fake.make_request(range(9)), fake.make_request(range(9))
    run(driver, first)
    driver.engine.model.salt = 1
    assert run(driver, second)[0] == fake.expected(range(9), 8, salt=1)
    assert second.num_cached == 0


def test_closing():
    driver = Driver(fake.make_engine())
    request = fake.make_request([1, 2], 40)
    with driver.call([request]) as call:
        call.wait(lambda: request.num_output > 0)
        driver.close()
        call.wait(lambda: request.finished)
    assert isinstance(request.error, RequestAbortedError)
    with pytest.raises(EngineClosedError):
        driver.run([fake.make_request([1, 2])])


def test_calling_from_a_callback_is_refused_rather_than_hanging():
    driver = Driver(fake.make_engine())
    outer = fake.make_request([1, 2], on_token=lambda request: driver.run([fake.make_request([3])]))
    with pytest.raises(UnsupportedCallError, match="callback"):
        driver.run([outer])
    fake.assert_empty(driver.engine)


# ------------------------------------------------------------------------------------------------- interrupts, in place


@pytest.mark.parametrize("where", ["on_token", "stop_check", "sampler", "forward", "refresh"])
def test_an_interrupt_leaves_an_engine_that_works(where):
    engine = fake.make_engine()
    driver = Driver(engine)
    request = fake.make_request([1, 2, 3], 6)

    def strike(*_):
        if request.num_output >= (where != "sampler"):
            raise Interrupt

    if where == "sampler":
        request.sampler = type("Struck", (), {"sample": strike})()
    elif where == "forward":
        engine.model.before = strike
    elif where == "refresh":
        engine.model.fingerprint = lambda: exec("raise KeyboardInterrupt")
    else:
        setattr(request, where, strike)
    with pytest.raises(KeyboardInterrupt):
        driver.run([request])
    engine.model.before = None
    engine.model.__dict__.pop("fingerprint", None)
    assert request.finish_reason in {"refresh": (None,), "stop_check": ("abort", "error")}.get(where, ("abort",))
    after = some_requests(1)
    assert run(driver, *after) == right(*after)
    fake.assert_empty(engine)


def test_interrupted_while_it_drives_for_others():
    """The driver is struck in another caller's callback: its own requests go, the others don't notice."""
    driver = Driver(fake.make_engine())
    mine = fake.make_request([1, 2], 30)
    told = []

    def strike(request):
        told.append(request.num_output)
        if request.num_output == 3 and not mine.finished:
            raise Interrupt

    other = fake.make_request([3, 4], 9, on_token=strike)
    with driver.call([other]) as call:
        with pytest.raises(Interrupt):
            driver.run([mine])
        assert mine.finish_reason == "abort"
        call.wait(lambda: other.finished)
    assert [other.output_token_ids] == right(other)
    assert told == list(range(1, 10))
    fake.assert_empty(driver.engine)


def test_mail_that_is_broken_off_is_read_again():
    """A caller's requests are not lost when another, driving, is interrupted while it takes them."""
    driver = Driver(fake.make_engine())
    request = fake.make_request([1, 2, 3], 5)
    fingerprint = driver.engine.model.fingerprint
    driver.engine.model.fingerprint = lambda: exec("raise KeyboardInterrupt")
    with driver.call([request]) as call:
        with pytest.raises(KeyboardInterrupt):
            driver.run([fake.make_request([4])])
        driver.engine.model.fingerprint = fingerprint
        call.wait(lambda: request.finished)
    assert [request.output_token_ids] == right(request)
    fake.assert_empty(driver.engine)


# ------------------------------------------------------------------------------------------------------ many callers


def test_many_callers_meet_in_one_batch():
    driver = Driver(fake.make_engine(max_num_batched_tokens=64, num_blocks=256))
    calls = [some_requests(seed) for seed in range(64)]
    results = in_threads(*[lambda call=call: run(driver, *call) for call in calls])
    assert results == [right(*call) for call in calls]
    fake.assert_empty(driver.engine)
    assert max(driver.engine.model.num_tokens) > 16


def test_a_driver_hands_over():
    """Calls of very different lengths: those that drive first leave first."""
    driver = Driver(fake.make_engine())
    calls = [fake.make_request([index], 1 + 3 * index) for index in range(20)]
    results = in_threads(*[lambda call=call: run(driver, call) for call in calls])
    assert results == [right(call) for call in calls]
    fake.assert_empty(driver.engine)


class Hold:
    """Hands logits out and waits for a push."""

    def __init__(self):
        self.logits = {}

    def sample(self, requests, logits):
        self.logits.update(zip(requests, logits, strict=True))
        return Sampled([None] * len(requests))


def push_all(driver, count):
    """One caller's two requests, whose tokens it chooses itself, both at a time."""
    hold = Hold()
    requests = [fake.make_request([token], 50, sampler=hold) for token in (count, count + 1)]
    with driver.call(requests) as call:
        for number in range(count):
            call.wait(lambda: all(request.held for request in requests))
            assert [request.num_output for request in requests] == [number, number]
            call.push([(r, int(hold.logits[r].argmax()), number == count - 1) for r in requests])
        call.wait(lambda: all(request.finished for request in requests))
    return [request.output_token_ids for request in requests]


def test_callers_that_choose_their_own_tokens():
    """What was pushed counts from the moment it was, also while another thread drives."""
    driver = Driver(fake.make_engine(num_blocks=24))
    results = in_threads(*[lambda count=count: push_all(driver, count) for count in range(1, 17)])
    assert results == [[fake.expected([c], c), fake.expected([c + 1], c)] for c in range(1, 17)]
    fake.assert_empty(driver.engine)


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
    """A caller's requests; every third caller's raise somewhere, some interrupt whoever drives."""
    pick = random.Random(index)
    requests = some_requests(index)
    victim, trouble = pick.choice(requests), index % 9

    def fail(request):
        if request.num_output >= 1:
            raise Oops

    def interrupt(request):
        if request.num_output == 1:
            raise Interrupt

    if trouble == 0:
        victim.on_token = fail
    elif trouble == 3:
        victim.stop_check = fail
    elif trouble == 6:
        victim.sampler = Raising()
    elif trouble == 7:
        victim.on_token = interrupt
    elif trouble == 8:
        victim.prompt_token_ids[-1] = victim.token_ids[-1] = fake.VOCAB - 1  # poisons the forward
    return requests


def raise_interrupt(request):
    raise Interrupt


@pytest.mark.parametrize("where", [(Call, "__exit__"), (Driver, "_surely_stand_up")], ids=["exit", "stand up"])
def test_an_interrupt_strikes_as_leaving_begins(monkeypatch, where):
    """Between the call of a function and its first statement: nothing in that function can catch it."""
    engine = fake.make_engine()
    driver = Driver(engine)
    struck = []
    method = getattr(*where)

    def strike(*arguments):
        if not struck:
            struck.append(1)
            raise Interrupt
        return method(*arguments)

    monkeypatch.setattr(*where, strike)
    requests = some_requests(0)
    requests[0].on_token = raise_interrupt
    with pytest.raises(Interrupt):
        driver.run(requests)
    assert not driver.busy
    fake.assert_empty(engine)
    again = some_requests(0)
    assert run(driver, *again) == right(*some_requests(0))


@pytest.mark.parametrize("windows", [fake.FULL, fake.BOTH], ids=["full", "both"])
@pytest.mark.parametrize("seed", range(4))
def test_64_callers_some_raising_some_interrupted(seed, windows):
    engine = fake.make_engine(windows, num_blocks=40, max_num_batched_tokens=32)
    engine.model.poison = fake.VOCAB - 1
    engine.model.before = striker = Striker(seed, 0.1)
    driver = Driver(engine, release_when_idle=seed % 2 == 1)
    calls = [troubled(64 * seed + index) for index in range(64)]
    results = in_threads(*[striker.exposed(lambda call=call: run(driver, *call)) for call in calls])

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
    assert engine.stats.pool_bytes == 0 or not driver.release_when_idle
    engine.model.before = None
    after = some_requests(5)
    assert run(driver, *after) == right(*after, windows=windows)


def test_a_failing_forward_concerns_the_request_at_fault():
    engine = fake.make_engine()
    engine.model.poison = fake.VOCAB - 1
    driver = Driver(engine)
    calls = [fake.make_request([index, fake.VOCAB - 1 if index == 5 else 7, 1], 6) for index in range(12)]
    results = in_threads(*[lambda call=call: run(driver, call) for call in calls])
    for index, (call, result) in enumerate(zip(calls, results, strict=True)):
        if index == 5:
            assert "poisoned" in str(result)
        else:
            assert result == right(call)
    fake.assert_empty(engine)


def test_one_caller_may_be_in_inference_mode():
    """What is made under one caller's inference mode can be written under another's ordinary mode."""
    driver = Driver(fake.make_engine())
    with torch.inference_mode():
        run(driver, fake.make_request([1, 2, 3]))
    request = fake.make_request([1, 2, 3, 4, 5, 6, 7], 30)
    assert run(driver, request) == right(request)


def test_memory_is_given_back_though_the_last_caller_leaves_while_another_stands_up(monkeypatch):
    """It finds the seat taken and goes; who sits there has read its mail and looked before, and has to look again."""
    driver = Driver(fake.make_engine(num_blocks=None), release_when_idle=True)
    first, last = fake.make_request([1, 2], 3), fake.make_request([3], 3)
    leaving, stand_up = driver.call([last]), Driver._stand_up
    mailed, looked = threading.Event(), threading.Event()

    class Inside(set):
        def discard(self, call):
            if call is leaving:
                mailed.set()
                looked.wait(HANGS)
            super().discard(call)

    def stand_up_late(self, me):
        if mailed.is_set() and not looked.is_set():
            looked.set()
            thread.join(HANGS)
        stand_up(self, me)

    driver._inside = Inside()
    leaving.__enter__()
    with driver.call([first]) as call:
        call.wait(lambda: first.finished)
        assert driver.engine.stats.pool_bytes > 0
        monkeypatch.setattr(Driver, "_stand_up", stand_up_late)
        thread = threading.Thread(target=leaving.__exit__, args=(None, None, None))
        thread.start()
        assert mailed.wait(HANGS)
    assert not thread.is_alive()
    assert not driver.busy
    assert driver.engine.stats.pool_bytes == 0
