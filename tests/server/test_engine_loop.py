"""The loop of an engine process, over a real engine and without sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stock import build

import zoo
from hf_paged import LLM, InvalidRequestError, PagedConfig, Reject, hookimpl
from hf_paged.request import Request
from hf_paged.server import engine_loop
from hf_paged.server.engine_loop import EngineLoop, StepLog, is_device_lost
from hf_paged.server.messages import (
    Abort,
    Add,
    Delta,
    Deltas,
    EngineStats,
    Stop,
    WatchBlocks,
    decode_from_engine,
    encode,
)

GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


class Socket:
    """Both ends of a socket at once: what is to be read, and what was sent."""

    def __init__(self) -> None:
        self.unread: list[bytes] = []
        self.sent: list[Any] = []

    def poll(self, timeout: int) -> bool:
        return bool(self.unread)

    def recv(self) -> bytes:
        return self.unread.pop(0)

    def send(self, packed: bytes) -> None:
        self.sent.append(decode_from_engine(packed))


class Plugin:
    """Turns away what begins with 99."""

    @hookimpl
    def admit_request(self, request: Request, stats: Any) -> Reject | None:
        return Reject("not today", 7.0) if request.prompt_token_ids[0] == 99 else None


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    config = PagedConfig(plugins=(Plugin(),), block_size=4)
    with LLM(zoo.build("llama"), skip_tokenizer_init=True, config=config) as made:
        yield made


@pytest.fixture
def loop(llm: LLM) -> Iterator[tuple[EngineLoop, Socket]]:
    yield from loop_over(llm)


def loop_over(llm: LLM) -> Iterator[tuple[EngineLoop, Socket]]:
    socket = Socket()
    built, _ = llm.engine()

    def constrain(request: Request) -> None:
        broken = request.prompt_token_ids[0] == 98
        raise RuntimeError("the compiler broke") if broken else InvalidRequestError("no such grammar")

    made = EngineLoop(built.engine, socket, socket, StepLog(), 3, constrain)  # type: ignore[arg-type]
    made._engine.close = lambda: None  # type: ignore[method-assign]
    yield made, socket
    del made._engine.close


def run(loop: tuple[EngineLoop, Socket], *messages: Any, until: int = 1) -> dict[str, list[Delta]]:
    """Read the messages, and go on until so many requests have ended; the deltas of each."""
    made, socket = loop
    socket.unread += [encode(message) for message in messages]
    deltas: dict[str, list[Delta]] = {}
    for _ in range(2000):
        made.read()
        if made._engine.has_work:
            made._engine.step()
        made._send_deltas()
        made._report()
        for message in socket.sent:
            for delta in message.deltas if isinstance(message, Deltas) else []:
                deltas.setdefault(delta.id, []).append(delta)
        socket.sent = [message for message in socket.sent if not isinstance(message, Deltas)]
        if sum(found[-1].finish is not None for found in deltas.values()) >= until:
            return deltas
    raise AssertionError("they never ended")


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def test_a_request_and_its_continuation(loop: Any) -> None:
    whole = run(loop, Add("a", [5, 6, 7], GREEDY))["a"]
    assert len(tokens(whole)) == 6
    assert [delta.finish for delta in whole] == [None] * 5 + ["length"]
    assert (whole[0].cached, whole[1].cached) == (0, None)
    assert whole[-1].prefill > 0
    again = run(loop, Add("b", [5, 6, 7], GREEDY, output=tokens(whole)[:4]))["b"]
    assert tokens(again) == tokens(whole)[4:]


def test_a_request_is_as_old_as_its_call(loop: Any) -> None:
    """Its turn depends on that; the time that it waited in the front is the front's to count."""
    came = time.monotonic() - 1000
    made, socket = loop
    socket.unread.append(encode(Add("a", [5, 6, 7], GREEDY, arrival=came)))
    made.read()
    assert made._carried["a"].request.metrics.arrival_time == came
    assert 0 <= run(loop)["a"][-1].queued < 500


def test_logprobs_are_told_once(loop: Any) -> None:
    params = GREEDY | {"logprobs": 2, "prompt_logprobs": 1}
    whole = run(loop, Add("a", [5, 6, 7], params))["a"]
    assert [len(delta.logprobs or []) for delta in whole] == [len(delta.tokens) for delta in whole]
    assert [entry is None for entry in whole[0].prompt_logprobs or []] == [True, False, False]
    assert all(delta.prompt_logprobs is None for delta in whole[1:])
    resumed = run(loop, Add("b", [5, 6, 7], GREEDY | {"logprobs": 2}, output=tokens(whole)[:3]))["b"]
    assert [entry.ids for delta in resumed for entry in delta.logprobs or []] == [
        entry.ids for delta in whole[3:] for entry in delta.logprobs or []
    ]


def test_parents_and_children(loop: Any) -> None:
    adds = [Add("p", [5, 6, 7, 8, 9], GREEDY), Add("c", [5, 6, 7, 8, 9], GREEDY, parent="p")]
    found = run(loop, *adds, Add("d", [5, 6, 7, 8, 9], GREEDY, parent="gone"), until=3)
    assert tokens(found["p"]) == tokens(found["c"]) == tokens(found["d"])


@pytest.mark.parametrize(
    ("add", "kind", "text"),
    [
        (Add("x", [5, 999], GREEDY), "invalid", "outside the vocabulary"),
        (Add("x", [], GREEDY), "invalid", "the prompt is empty"),
        (Add("x", [5], {"temperature": 9.0}), "invalid", "temperature"),
        (Add("x", [99, 5], GREEDY), "rejected", "not today"),
        (Add("x", [5], {"structured_outputs": {"regex": "a"}}), "invalid", "no such grammar"),
        (Add("x", [98], {"structured_outputs": {"regex": "a"}}), "internal", "the compiler broke"),
    ],
)
def test_refusals(loop: Any, add: Add, kind: str, text: str) -> None:
    found = run(loop, add, Add("y", [5, 6], GREEDY), until=2)
    (refusal,) = found["x"]
    assert (refusal.finish, refusal.error_kind) == ("error" if kind == "internal" else "refused", kind)
    assert text in (refusal.error or "")
    assert refusal.retry_after == (7.0 if kind == "rejected" else None)
    assert len(tokens(found["y"])) == 6
    assert not loop[0]._carried


def test_aborting_says_nothing_more(loop: Any) -> None:
    long = GREEDY | {"max_tokens": 400}
    found = run(loop, Add("x", [5, 6], long), Add("y", [7], GREEDY), Abort(["x", "unknown"]))
    assert list(found) == ["y"]
    assert not loop[0]._engine.has_work
    constrained = Add("z", [5], {"structured_outputs": {"regex": "a"}})
    assert list(run(loop, constrained, Abort(["z"]), Add("y", [7], GREEDY))) == ["y"]


def test_statistics(loop: Any) -> None:
    long = Add("x", [5, 6, 7], GREEDY | {"max_tokens": 400})
    run(loop, long, Add("y", [7], GREEDY))
    (group,) = reported(loop).groups
    assert group.blocks is None  # nobody watches
    run(loop, WatchBlocks(60), Add("y", [7], GREEDY))
    last = reported(loop)
    assert (last.replica, last.busy, last.running) == (3, True, ["x"])
    (group,) = last.groups
    assert (group.window, group.num_blocks, group.num_free) == (None, last.num_blocks, last.num_free)
    assert group.blocks is not None
    assert len(group.blocks["x"]) == group.num_blocks - group.num_free >= 1
    assert 0 < last.kv_usage <= 1
    run(loop, Abort(["x"]), Add("z", [5], GREEDY))


def reported(loop: Any) -> EngineStats:
    loop[0]._next_report = 0.0
    loop[0]._report()
    last = loop[1].sent[-1]
    assert isinstance(last, EngineStats)
    return last


def test_blocks_are_told_for_each_group() -> None:
    with LLM(build("gemma2"), skip_tokenizer_init=True, config=PagedConfig(block_size=4)) as llm:
        for loop in loop_over(llm):
            made, socket = loop
            socket.unread.append(encode(WatchBlocks(60)))
            made.read()
            assert [group.num_blocks for group in reported(loop).groups] == [0, 0]  # there is no pool yet
            run(loop, Add("x", [5] * 3 * zoo.WINDOW, GREEDY | {"max_tokens": 400}), Add("y", [7], GREEDY))
            last = reported(loop)
            full, sliding = last.groups
            assert (full.window, sliding.window) == (None, zoo.WINDOW)
            assert full.num_blocks + sliding.num_blocks == last.num_blocks
            assert full.num_free + sliding.num_free == last.num_free
            assert full.blocks is not None
            assert sliding.blocks is not None
            assert list(full.blocks) == list(sliding.blocks) == ["x"]
            held = [[block for block in group.blocks["x"] if block] for group in (full, sliding) if group.blocks]
            assert len(held[0]) > len(held[1]) > 0  # what fell out of the window was given up
            assert [len(set(ids)) for ids in held] == [group.num_blocks - group.num_free for group in last.groups]
            run(loop, Abort(["x"]), Add("z", [5], GREEDY))


def test_stop_ends_the_loop(loop: Any) -> None:
    loop[1].unread.append(encode(Stop()))
    loop[0].run()


def test_a_lost_device_ends_the_process(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(engine_loop.os, "_exit", end)
    request = Request("x", [5])
    request.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(Ended, match="70"):
        loop[0]._note(request)
    assert not is_device_lost(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_device_lost(ValueError("x"))
