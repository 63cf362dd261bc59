"""Retry-After: what clients are told is what the server measured. Time is the tests' own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from server.fakes import READY

from hf_paged import PagedConfig, SamplingParams
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError
from hf_paged.server.front import fleet, sequence
from hf_paged.server.front.fleet import Fleet
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.messages import Delta, Ready
from hf_paged.server.pace import WINDOW, Pace, bounded
from hf_paged.server.stats import RequestRecord, ServerStats

NIGHT = 8 * 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ------------------------------------------------------------------------------------------------------------- the pace


def test_work_a_second(clock: Clock) -> None:
    pace = Pace(clock)
    assert pace.rate is None
    pace.watch(True)
    for _ in range(50):
        clock.now += 0.1
        pace.done(3)
    assert pace.rate == pytest.approx(30)
    clock.now += 5  # nothing gets done meanwhile
    assert pace.rate == pytest.approx(15)


def test_time_in_which_nothing_waits_does_not_count(clock: Clock) -> None:
    pace = Pace(clock)
    pace.watch(True)
    for _ in range(10):
        clock.now += 1
        pace.done()
    pace.watch(False)
    for _ in range(100):  # nor does what is done then
        clock.now += NIGHT / 100
        pace.done()
    assert pace.rate == pytest.approx(1)
    pace.watch(True)
    clock.now += 10
    assert pace.rate == pytest.approx(0.5)


def test_what_is_long_ago_is_forgotten(clock: Clock) -> None:
    pace = Pace(clock)
    pace.watch(True)
    for _ in range(100_000):
        clock.now += 0.001
        pace.done()
    assert pace.rate == pytest.approx(1000, rel=0.02)
    assert len(pace._kept) <= WINDOW + 1
    clock.now += WINDOW / 2
    assert pace.rate == pytest.approx(500, rel=0.05)
    clock.now += WINDOW / 2
    assert pace.rate is None


def test_a_moment_tells_nothing(clock: Clock) -> None:
    pace = Pace(clock)
    pace.watch(True)
    clock.now += 0.001
    pace.done()
    assert pace.rate is None


@pytest.mark.parametrize(("seconds", "told"), [(0, 1), (0.2, 1), (7.5, 7.5), (1e9, 60), (float("inf"), 60)])
def test_bounds(seconds: float, told: float) -> None:
    assert bounded(seconds) == told


# ------------------------------------------------------------------------------------------------------------ the fleet


class Scripted:
    """A fleet of one replica with two seats, whose engine is the test."""

    def __init__(self, clock: Clock) -> None:
        config = ServerConfig(model="x", paged=PagedConfig(max_num_seqs=1), max_queue_requests=1000)
        self.fleet = Fleet(config, ServerStats())
        self.fleet._pace = Pace(clock)
        self.fleet._began = clock.now
        self.replica = self.fleet._replicas[0]
        self._clock = clock
        self._number = 0

    def ready(self) -> Scripted:
        fields = {name: getattr(READY, name) for name in READY.__struct_fields__} | {"max_num_seqs": 1}
        self.replica.state = "ready"
        self.fleet._closed = True  # keeps it from starting processes
        self.fleet._spares = SimpleNamespace(prepare=no_spare)  # type: ignore[assignment]
        self.fleet.replica_ready(self.replica, Ready(**fields))
        self.fleet._closed = False
        return self

    def submit(self, count: int, tokens: int = 100) -> None:
        for _ in range(count):
            self._number += 1
            record = RequestRecord(f"r{self._number}", "client", arrival=self._clock.now)
            self.fleet.submit([Sequence(record, [1], SamplingParams(max_tokens=tokens))])

    def bring(self, count: int, finish: str | None = None) -> None:
        """Tokens for the one that is longest on the engine."""
        name = next(iter(self.replica.sequences))
        self.fleet.replica_brought(self.replica, Delta(name, tokens=[7] * count, finish=finish))

    def serve(self, seconds: float, each: float) -> None:
        """Sequences of ten tokens end, one after the other, `each` seconds apart."""
        for _ in range(round(seconds / each)):
            self._clock.now += each
            self.bring(10, "stop")

    @property
    def waiting(self) -> int:
        return self.fleet.snapshot().waiting

    @property
    def told(self) -> float:
        """What is told to one who comes when the queue is full."""
        self.fleet._config = SimpleNamespace(**{**vars(self.fleet._config), "max_queue_requests": self.waiting})
        with pytest.raises(APIError) as caught:
            self.fleet.check_room(1)
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.retry_after is not None
        return caught.value.retry_after


async def no_spare() -> None: ...


@pytest.fixture
def scripted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a test over a scripted fleet, in an event loop that it doesn't wait in."""
    for module in (fleet, sequence):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))

    def run(test: Any) -> None:
        async def main() -> None:
            made = Scripted(clock)
            try:
                test(made)
            finally:
                made.fleet._sockets.close()

        asyncio.run(main())

    return run


def test_quick_ones(scripted: Any) -> None:
    def test(made: Scripted) -> None:
        made.ready().submit(200)
        made.serve(2.0, 0.02)
        assert made.waiting == 98
        assert made.told == 1  # fifty a second

    scripted(test)


def test_half_of_the_queue_at_the_pace_of_late(scripted: Any) -> None:
    def test(made: Scripted) -> None:
        made.ready().submit(142)
        made.serve(20.0, 0.5)
        assert made.waiting == 100
        assert made.told == pytest.approx(101 / 2 / 2)

    scripted(test)


def test_an_idle_night_and_a_burst(scripted: Any, clock: Clock) -> None:
    def test(made: Scripted) -> None:
        made.ready().submit(52)
        made.serve(5.2, 0.1)
        assert made.fleet.snapshot().running == 0
        for _ in range(8):  # one an hour
            clock.now += 3600
            made.submit(1)
            made.serve(60.0, 60.0)
        clock.now += 3600
        made.submit(102)
        assert made.told == pytest.approx(101 / 2 / 10, rel=0.1)  # ten a second, as before

    scripted(test)


def test_nothing_has_ended_and_long_ones_run(scripted: Any, clock: Clock) -> None:
    def test(made: Scripted) -> None:
        made.ready().submit(4, tokens=60)
        for name in list(made.replica.sequences):
            made.fleet.replica_brought(made.replica, Delta(name, tokens=[7]))
        clock.now += 10
        for name in list(made.replica.sequences):
            made.fleet.replica_brought(made.replica, Delta(name, tokens=[7] * 19))
        # A third of what they may take after 10 s: each stays 30 s, so one of the two ends each 15 s.
        assert made.told == pytest.approx(3 / 2 * 15)
        clock.now += 20  # they have become slower
        assert made.told == 60

    scripted(test)


def test_how_long_outputs_are_is_known_from_before(scripted: Any, clock: Clock) -> None:
    def test(made: Scripted) -> None:
        made.ready()
        for _ in range(20):  # one at a time: nothing ever waits
            made.submit(1, tokens=100_000)
            made.serve(1.0, 1.0)
        made.submit(6, tokens=100_000)
        clock.now += 2
        made.bring(5)
        assert made.told == pytest.approx(5 / 2 * 2, rel=0.1)  # about ten tokens, so one ends each 2 s

    scripted(test)


def test_as_long_again_where_nothing_is_known(scripted: Any, clock: Clock) -> None:
    def test(made: Scripted) -> None:
        made.ready().submit(5)
        clock.now += 12
        assert made.told == 12
        clock.now += 100
        assert made.told == 60

    scripted(test)


def test_what_leaves_before_its_turn_does_not_count(scripted: Any, clock: Clock) -> None:
    def test(made: Scripted) -> None:
        made.ready().submit(1002)
        for one in list(made.fleet._queue)[:900]:
            clock.now += 0.01
            made.fleet.abort(one)
        assert made.told == pytest.approx(9)  # nothing is known of the engine

    scripted(test)


def test_one_that_waited_too_long_is_told(scripted: Any, clock: Clock) -> None:
    def test(made: Scripted) -> None:
        made.ready().submit(32)
        made.serve(10.0, 1.0)
        last = made.fleet._queue[-1]
        made.fleet._waited_too_long(last)
        (delta,) = last._unread
        assert (delta.finish, delta.retry_after) == ("queue_timeout", pytest.approx(21 / 2))

    scripted(test)


def test_while_the_model_is_loaded(scripted: Any, clock: Clock) -> None:
    def test(made: Scripted) -> None:
        def told() -> float | None:
            with pytest.raises(APIError) as caught:
                made.fleet.check_room(1)
            assert caught.value.status == 503
            return caught.value.retry_after

        assert told() == 1
        clock.now += 20
        assert told() == 20  # as long again
        made.ready()
        made.fleet.check_room(1)
        made.replica.state, made.replica._failed_starts = "restarting", 1
        assert told() == 20  # as the first time

    scripted(test)
