"""Fleet: what it does with its requests when engines die, hang, or are full. Engines are scripted, in this process."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from server.fakes import READY

from hf_paged import PagedConfig, SamplingParams
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError
from hf_paged.server.front import process, replica
from hf_paged.server.front.fleet import Fleet
from hf_paged.server.front.process import Spares
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.front.sockets import Sockets, sweep
from hf_paged.server.messages import (
    Abort,
    Add,
    Delta,
    Deltas,
    EngineStats,
    Failed,
    Hello,
    Ready,
    Stop,
    decode_to_engine,
    encode,
)
from hf_paged.server.stats import RequestRecord, ServerStats

KILLS, HANGS, REFUSED = 250, 251, 252  # prompts that begin so kill the engine at their third token, and so on


def following(tokens: list[int]) -> int:
    """The scripted model: a token that depends on all before it."""
    return (sum(tokens) * 31 + len(tokens)) % 200


class ScriptedEngine:
    """Looks like an engine process to the front: takes orders, speaks the messages, dies on command."""

    started: list[ScriptedEngine]
    failing = 0  # of the next ones, how many can't be built
    silent = 0  # of the next ones, how many are never ready

    def __init__(self) -> None:
        type(self).started.append(self)
        self.pid = 1000 + len(self.started)
        self.returncode: int | None = None
        self.stdin = self
        self.seen: list[str] = []
        self.placed: list[list[str]] = []  # what it held, at each step
        self.ever: set[str] = set()
        self._requests: dict[str, tuple[list[int], int, int]] = {}
        self._dead = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def write(self, orders: bytes) -> None:
        self._orders = pickle.loads(orders)
        self._task = asyncio.create_task(self._run())

    async def drain(self) -> None: ...

    async def wait(self) -> int:
        await self._dead.wait()
        return self.returncode or 0

    def kill(self) -> None:
        self.die(-9)

    def die(self, status: int) -> None:
        if self.returncode is None:
            self.returncode = status
            self._dead.set()
            if self._task:
                self._task.cancel()

    async def _run(self) -> None:
        context = zmq.asyncio.Context.instance()
        inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        inbox.bind(self._orders.inbox)
        outbox.bind(self._orders.outbox)
        try:
            assert isinstance(decode_to_engine(await inbox.recv()), Hello)
            if type(self).failing:
                type(self).failing -= 1
                await outbox.send(encode(Failed("no memory")))
                return
            if type(self).silent:
                type(self).silent -= 1
                await asyncio.Event().wait()
            ready = Ready(**{name: getattr(READY, name) for name in READY.__struct_fields__})
            ready.max_num_seqs = self._orders.config.paged.max_num_seqs
            await outbox.send(encode(ready))
            await self._serve(inbox, outbox)
        finally:
            inbox.close()
            outbox.close(linger=100)
            self.die(1)

    async def _serve(self, inbox: Any, outbox: Any) -> None:
        while True:
            while await inbox.poll(1):
                message = decode_to_engine(await inbox.recv())
                if isinstance(message, Stop):
                    return self.die(0)
                self._handle(message)
            self.placed.append(sorted(self._requests))
            if any(tokens[0] == HANGS for tokens, _, _ in self._requests.values()):
                await asyncio.Event().wait()
            deltas = [self._step(name) for name in list(self._requests)]
            await outbox.send(encode(Deltas([delta for delta in deltas if delta])))
            await outbox.send(encode(EngineStats(0, 0, len(self.placed), True, [], [], 0, 1, 1, 16, 0, 0, 0)))

    def _handle(self, message: Any) -> None:
        if isinstance(message, Add):
            assert message.prompt[0] != REFUSED or not message.output
            self.ever.add(message.id)
            tokens = [*message.prompt, *message.output]
            self._requests[message.id] = tokens, len(message.prompt), message.params.get("max_tokens", 16)
        elif isinstance(message, Abort):
            for name in message.ids:
                self._requests.pop(name, None)

    def _step(self, name: str) -> Delta | None:
        tokens, prompt, most = self._requests[name]
        if tokens[0] == REFUSED:
            del self._requests[name]
            return Delta(name, finish="refused", error="no", error_kind="invalid")
        if tokens[0] == KILLS and len(tokens) == prompt + 2:
            self.die(-6)
            raise asyncio.CancelledError
        tokens.append(following(tokens))
        done = len(tokens) - prompt == most
        if done:
            del self._requests[name]
        return Delta(name, tokens=tokens[-1:], finish="length" if done else None)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a test's coroutine over a fleet of scripted engines."""
    ScriptedEngine.started, ScriptedEngine.failing, ScriptedEngine.silent = [], 0, 0
    monkeypatch.setattr(replica, "FIRST_PAUSE", 0.01)

    async def take(self: Spares) -> Any:
        return ScriptedEngine()

    monkeypatch.setattr(Spares, "take", take)

    def run(test: Callable[[Fleet], Coroutine[Any, Any, None]], max_num_seqs: int = 8, **options: Any) -> None:
        async def main() -> None:
            paged = PagedConfig(max_num_seqs=max_num_seqs, scheduler=options.pop("scheduler", "fcfs"))
            config = ServerConfig(model="x", paged=paged, spare_engine=False, **options)
            made = Fleet(config, ServerStats())
            made.start()
            try:
                await asyncio.wait_for(made.wait_ready(), 60)
                await asyncio.wait_for(test(made), 120)
            finally:
                await made.close()

        asyncio.run(main())

    return run


def asked(*prompt: int, count: int = 24, name: str = "", **options: Any) -> Sequence:
    record = RequestRecord(name or f"r{prompt}", "client")
    return Sequence(record, list(prompt), SamplingParams(temperature=0, max_tokens=count), **options)


def answer(one: Sequence) -> list[int]:
    tokens = list(one.prompt)
    for _ in range(one.params.max_tokens or 0):
        tokens.append(following(tokens))
    return tokens[len(one.prompt) :]


def begun(fleet: Fleet, one: Sequence) -> Sequence:
    fleet.submit([one])
    return one


async def read(stream: Any) -> tuple[list[int], Delta]:
    tokens: list[int] = []
    async for delta in stream:
        tokens += delta.tokens
    return tokens, delta


async def carried(fleet: Fleet, ones: list[Sequence]) -> list[tuple[list[int], Delta]]:
    return list(await asyncio.gather(*(read(begun(fleet, one)) for one in ones)))


def test_answers_survive_engines(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        ones = [asked(i, count=60) for i in range(6)]
        reading = asyncio.create_task(carried(made, ones))
        for number in range(4):
            while len(ScriptedEngine.started) <= number or len(ScriptedEngine.started[number].placed) < 12:
                await asyncio.sleep(0.005)
            ScriptedEngine.started[number].kill()
        for one, (tokens, last) in zip(ones, await reading, strict=True):
            assert (tokens, last.finish) == (answer(one), "length")
        assert made._stats.totals.restarts == 4
        assert made._stats.totals.output_tokens == 360

    fleet(test)


def test_a_request_that_kills_twice_is_given_up_alone(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        ones = [asked(i, count=40) for i in range(5)]
        poison = asked(KILLS, count=40)
        *others, (_, last) = await carried(made, [*ones, poison])
        assert (last.finish, last.error_kind) == ("error", "internal")
        assert "given up" in (last.error or "")
        for one, (tokens, delta) in zip(ones, others, strict=True):
            assert (tokens, delta.finish) == (answer(one), "length")
        assert len(ScriptedEngine.started) <= 4
        after = asked(7)
        assert (await carried(made, [after]))[0][0] == answer(after)

    fleet(test)


def test_a_request_that_is_alone_and_kills(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        ((_, last),) = await carried(made, [asked(KILLS)])
        assert last.finish == "error"
        assert len(ScriptedEngine.started) in (3, 4)  # the next one is being started, or is

    fleet(test)


def test_replicas_take_each_others_requests(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        while made.snapshot().replicas != ("ready", "ready"):
            await asyncio.sleep(0.005)
        ones = [asked(i, count=60) for i in range(8)]
        reading = asyncio.create_task(carried(made, ones))
        while made._stats.totals.output_tokens < 80:
            await asyncio.sleep(0.005)
        first, second = ScriptedEngine.started[:2]
        assert 2 <= len(first.ever) <= 6  # balanced
        assert len(first.ever) + len(second.ever) == 8
        first.kill()
        assert [tokens for tokens, _ in await reading] == [answer(one) for one in ones]

    fleet(test, replicas=2)


def test_prefix_affinity(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        while made.snapshot().replicas != ("ready", "ready"):
            await asyncio.sleep(0.005)
        common = [list(range(i, i + 128)) for i in (0, 100)]
        for number in range(8):
            one = asked(*common[number % 2], number, count=4, name=str(number))
            await carried(made, [one])
        first, second = (engine.ever for engine in ScriptedEngine.started)
        assert {frozenset(first), frozenset(second)} == {frozenset("0246"), frozenset("1357")}

    fleet(test, replicas=2)


def test_a_hanging_engine_is_noticed_and_replaced(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        one, hanging = asked(1, count=400), asked(HANGS)
        reading = asyncio.create_task(carried(made, [one, hanging]))
        unhealthy = False
        while not reading.done():
            unhealthy = unhealthy or not made.snapshot().alive
            await asyncio.sleep(0.01)
        (tokens, _), (_, last) = reading.result()
        assert unhealthy
        assert tokens == answer(one)
        assert last.finish == "error"
        assert made.snapshot().alive

    fleet(test, watchdog=0.2)


def test_an_engine_that_can_not_be_started_at_first(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        ScriptedEngine.failing = 2
        ScriptedEngine.started[0].kill()
        one = asked(1)
        assert (await carried(made, [one]))[0][0] == answer(one)  # it waited
        assert len(ScriptedEngine.started) == 4

    fleet(test)
    ScriptedEngine.started, ScriptedEngine.failing = [], 1
    with pytest.raises(APIError, match="no memory"):
        fleet(test)


def test_a_restart_that_fails_is_unhealthy_until_one_succeeds(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        waiting = begun(made, asked(1))
        ScriptedEngine.failing = 3
        ScriptedEngine.started[0].kill()
        while made.snapshot().alive:
            await asyncio.sleep(0.001)
        assert made.snapshot().why == "engine 0 can't be started: no memory"
        with pytest.raises(APIError, match="can't be started: no memory") as caught:
            made.submit([asked(2)])
        assert caught.value.status == 503
        assert (await read(waiting))[0] == answer(asked(1))
        assert made.snapshot().alive

    fleet(test)


def test_an_engine_that_is_never_ready_is_replaced(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        ScriptedEngine.silent = 1
        ScriptedEngine.started[0].kill()
        one = asked(1)
        assert (await carried(made, [one]))[0][0] == answer(one)
        assert len(ScriptedEngine.started) >= 3

    fleet(test, startup_timeout=1.0)


# -------------------------------------------------------------------------------------------------- what fails in front


def test_what_can_not_be_packed_leaves_nothing(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        bad = SamplingParams(extra_args={"x": 2**70})
        for _ in range(5):
            with pytest.raises(APIError, match="can't be handed to an engine") as caught:
                made.submit([asked(1), Sequence(RequestRecord("bad", "client"), [2], bad)])
            assert caught.value.status == 400
        assert (made.snapshot().waiting, made.snapshot().waiting_tokens, made.snapshot().running) == (0, 0, 0)
        one = asked(1)
        assert (await carried(made, [one]))[0][0] == answer(one)

    fleet(test, max_num_seqs=1)


def test_numbers_of_a_schema_have_any_size() -> None:
    schema = {"type": "integer", "maximum": 2**64, "minimum": -(2**200)}
    params = SamplingParams(structured_outputs={"json": schema})
    one = Sequence(RequestRecord("a", "client"), [1], params)
    one.check()
    sent = decode_to_engine(encode(one.message()))
    assert isinstance(sent, Add)
    assert json.loads(SamplingParams(**sent.params).structured_outputs.json) == schema


def test_a_registration_that_fails_is_undone(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(made: Fleet) -> None:
        with monkeypatch.context() as patch:
            timers = made._set_timers
            patch.setattr(made, "_set_timers", lambda one: timers(one) if one.name == "good" else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                made.submit([asked(1, name="good"), asked(2)])
        assert (made.snapshot().waiting, made.snapshot().waiting_tokens, made.snapshot().running) == (0, 0, 0)
        assert not made._held
        one = asked(3)
        assert (await carried(made, [one]))[0][0] == answer(one)

    fleet(test, max_num_seqs=1)


@pytest.mark.parametrize("what", ["socket", "process"])
def test_supervision_outlives_what_fails_in_it(fleet: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    async def test(made: Fleet) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(*{"socket": (Sockets, "address", no_descriptors), "process": (Spares, "take", none)}[what])
            ScriptedEngine.started[0].kill()
            while made.snapshot().alive:
                await asyncio.sleep(0.001)
            assert "Too many open files" in made.snapshot().why
        one = asked(1)
        while not made.snapshot().ready:
            await asyncio.sleep(0.001)
        assert (await carried(made, [one]))[0][0] == answer(one)

    def no_descriptors(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    async def none(*_: Any) -> Any:
        no_descriptors()

    fleet(test)


def test_an_engine_that_can_not_be_told_something_is_replaced(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the request that it was not told of would wait for ever."""

    async def test(made: Fleet) -> None:
        def fails(*_: Any) -> None:
            raise zmq.ZMQError(errno.ENOMEM)

        monkeypatch.setattr(made._replicas[0]._process._to, "send", fails, raising=False)
        ones = [asked(i) for i in range(3)]
        assert [tokens for tokens, _ in await carried(made, ones)] == [answer(one) for one in ones]
        assert len(ScriptedEngine.started) == 2

    fleet(test)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
@pytest.mark.parametrize("left", range(8))
def test_a_process_that_can_not_be_started_leaves_no_descriptors(left: int) -> None:
    """The server runs on uvloop, which keeps what it had opened when the descriptors end."""
    uvloop = pytest.importorskip("uvloop")
    resource = pytest.importorskip("resource")

    async def test() -> None:
        before = len(os.listdir("/proc/self/fd"))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(64)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, limits[1]))
        try:
            for number in taken[:left]:
                os.close(number)
            with pytest.raises(OSError, match="Too many open files"):
                await process.spawn()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for number in taken[left:]:
                os.close(number)
        assert len(os.listdir("/proc/self/fd")) == before

    uvloop.run(test())


def test_a_removed_folder_of_sockets_is_made_again(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        shutil.rmtree(made._sockets._folder)
        one = asked(1)
        assert (await carried(made, [one]))[0][0] == answer(one)  # what is connected stays so
        ScriptedEngine.started[0].kill()
        assert (await carried(made, [asked(1)]))[0][0] == answer(one)

    fleet(test)


def test_a_path_that_is_too_long_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(deep))
    sockets = Sockets()
    try:
        address = sockets.address()
        assert len(address) - len("ipc://") <= zmq.IPC_PATH_MAX_LEN
        bound = sockets.plain.socket(zmq.PULL)
        bound.bind(address)
        bound.close()
    finally:
        sockets.close()
    assert not list(deep.iterdir())


def test_folders_of_dead_servers_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    sockets = Sockets()
    alive = Path(sockets.address().removeprefix("ipc://")).parent
    dead, foreign = tmp_path / "hf_paged-dead", tmp_path / "hf_paged-no-lock"
    for folder in (dead, foreign):
        folder.mkdir()
    (dead / "lock").touch()
    sweep()
    assert set(tmp_path.iterdir()) == {alive, foreign}
    sockets.close()
    assert set(tmp_path.iterdir()) == {foreign}


# ----------------------------------------------------------------------------------------------------------- the queue


def test_the_queue_is_bounded(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        streams = [begun(made, asked(i, count=50)) for i in range(3)]  # two seats and one more to come
        streams += [begun(made, asked(10 + i)) for i in range(2)]
        with pytest.raises(APIError) as caught:
            made.submit([asked(99)])
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert int(caught.value.headers["Retry-After"]) >= 1
        assert made.snapshot().waiting == 2
        with pytest.raises(APIError, match="6 sequences in one call are more than the 5") as never:
            made.submit([asked(i) for i in range(6)])
        assert never.value.status == 400
        for stream in streams:
            assert (await read(stream))[1].finish == "length"
        await carried(made, [asked(99)])

    fleet(test, max_num_seqs=2, max_queue_requests=2)


def test_the_queue_is_bounded_by_tokens(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        streams = [begun(made, asked(i, count=50)) for i in range(3)]
        streams.append(begun(made, asked(*range(90))))
        with pytest.raises(APIError, match="prompt tokens are waiting"):
            made.submit([asked(*range(20))])
        for stream in streams:
            await read(stream)

    fleet(test, max_num_seqs=2, max_queue_tokens=100)


def test_deadlines_and_leaving(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        now = asyncio.get_running_loop().time()
        running = [begun(made, asked(i, count=10_000)) for i in range(2)]
        late = begun(made, asked(5, count=10_000, deadline=now + 0.1))
        waiting = begun(made, asked(6, queue_deadline=now + 0.05))
        assert (await read(waiting))[1].finish == "queue_timeout"
        assert (await read(late))[1].finish == "deadline"
        for stream in running:
            await stream.__anext__()
            made.abort(stream)
        one = asked(7)
        assert (await carried(made, [one]))[0][0] == answer(one)
        assert made.snapshot().running == 0
        assert not made._held
        assert made._stats.totals.finished == {"queue_timeout": 1, "deadline": 1, "abort": 2, "length": 1}

    fleet(test, max_num_seqs=2)


def test_priority(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        ended: list[str] = []

        async def note(one: Sequence) -> None:
            await read(begun(made, one))
            ended.append(one.record.request_id)

        first = [asked(i, count=30, name=f"first{i}") for i in range(2)]
        last = asked(3, name="last", priority=1)
        soon = asked(4, name="soon", priority=-1)
        await asyncio.gather(*(note(one) for one in [*first, last, soon]))
        assert ended.index("soon") < ended.index("last")

    fleet(test, max_num_seqs=1, scheduler="priority")


def test_a_low_priority_is_served_though_high_ones_keep_coming(fleet: Any) -> None:
    """Whenever one ends, another one of a high priority comes, ten seconds later by its own clock."""

    async def test(made: Fleet) -> None:
        began = asyncio.get_running_loop().time()
        ended: list[int] = []

        async def note(priority: int, number: int) -> None:
            one = asked(number % 200, count=4, name=f"{priority}-{number}", priority=priority)
            one.record.arrival = began + 10.0 * number
            await read(begun(made, one))
            ended.append(priority)

        async def stream(first: int) -> None:
            for number in range(first, 1000, 4):
                if 3 in ended:
                    return
                await note(0, number)

        await asyncio.gather(*(stream(first) for first in range(4)), note(3, 0))
        assert 14 <= ended.index(3) <= 24  # three levels are three minutes; two seats and two that wait blur it

    fleet(test, max_num_seqs=1, scheduler="priority")


def test_requests_of_one_call_are_in_the_order_of_their_priorities(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        running = [begun(made, asked(i, count=10_000)) for i in range(2)]
        ones = [asked(9, name=f"{i}", priority=p) for i, p in enumerate((5, -(2**63), 2**63 - 1, 5, 0, 100))]
        for one in ones:
            one.record.arrival = ones[0].record.arrival
        made.submit(ones)
        assert [one.name for one in made._queue] == ["1", "4", "0", "3", "5", "2"]
        for stream in running:
            made.abort(stream)

    fleet(test, max_num_seqs=1, scheduler="priority")


def test_an_engine_is_told_when_the_call_came() -> None:
    one = asked(5)
    sent = decode_to_engine(encode(one.message()))
    assert sent.arrival == one.record.arrival


def test_what_an_engine_refuses(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        one = asked(REFUSED)
        ((_, last),) = await carried(made, [one])
        assert (last.finish, last.error_kind, last.error) == ("refused", "invalid", "no")
        assert (one.record.finish_reason, one.record.error) == ("refused", "no")
        assert made._stats.totals.finished == {}
        assert len(ScriptedEngine.started) == 1

    fleet(test)


def test_what_ran_and_is_refused_when_it_goes_on_failed() -> None:
    one = asked(5)
    one.take(Delta("x", tokens=[1]))
    assert one.take(Delta("x", finish="refused", error="not today", error_kind="rejected")).finish == "error"


def test_children_follow_their_parent(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        parent = asked(1, 2, name="p")
        children = [asked(1, 2, name=f"c{i}", parent=parent) for i in range(3)]
        made.submit([parent, *children])
        for one in (parent, *children):
            assert (await read(one))[0] == answer(parent)

    fleet(test)


def test_late_readers_get_deltas_as_one(fleet: Any) -> None:
    async def test(made: Fleet) -> None:
        one = asked(1)
        made.submit([one])
        while made.snapshot().running:
            await asyncio.sleep(0.01)
        delta = await one.__anext__()
        assert (delta.tokens, delta.finish) == (answer(one), "length")

    fleet(test)
