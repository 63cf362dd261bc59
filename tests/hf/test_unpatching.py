"""Patching and unpatching under callers: a call gets an answer, also if the patch is taken off meanwhile."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch
from stock import caught, padded, same_tensor, snapshot
from transformers import LogitsProcessor, PreTrainedModel

import hf_paged
import zoo
from hf_paged.engine.thread import EngineThread
from hf_paged.hf.engines import ModelEngines

BATCH = padded(zoo.prompts(2, (9, 4)))
KWARGS: dict[str, Any] = dict(max_new_tokens=12, do_sample=False)


class Untouched(LogitsProcessor):
    """Has a call take its steps in lockstep."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "with penalties": {"repetition_penalty": 1.3},
    "with a dict": {"return_dict_in_generate": True},
}


def answer(model: PreTrainedModel, call: str) -> list[list[int]]:
    result = model.generate(**BATCH, **KWARGS, **CALLS[call])
    return (result if isinstance(result, torch.Tensor) else result.sequences).tolist()


@pytest.mark.parametrize("mode", ["warn", "error"])
def test_callers_while_the_patch_comes_and_goes(llama: PreTrainedModel, mode: Any) -> None:
    """Every call ends with stock's answer: no EngineClosedError, no RequestAbortedError, no warning."""
    before = snapshot(llama)
    expected = {call: answer(llama, call) for call in CALLS}
    stop, wrong = threading.Event(), []
    done = [0]

    def call(seed: int) -> None:
        chosen = random.Random(seed)
        while not stop.is_set():
            kind = chosen.choice(list(CALLS))
            try:
                if answer(llama, kind) != expected[kind]:
                    wrong.append(f"another answer: {kind}")
            except Exception as error:
                wrong.append(repr(error))
            done[0] += 1

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(6)]
    with caught() as warned:
        for thread in threads:
            thread.start()
        chosen = random.Random(0)
        for _ in range(40):
            hf_paged.patch(llama, on_unsupported=mode)
            time.sleep(chosen.random() * 0.1)
            hf_paged.unpatch(llama)
            time.sleep(chosen.random() * 0.02)
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not wrong, f"{len(wrong)} of {done[0]}: {sorted(set(wrong))[:3]}"
    assert not any("unpatched" in line for line in warned)
    assert done[0] > 100
    assert snapshot(llama) == before


@pytest.mark.parametrize("draw", [False, True])
def test_a_call_whose_engine_is_closed_before_it_begins(
    llama: PreTrainedModel, draw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the model and the engine: another engine answers, with the numbers that stock draws."""
    kwargs = {**KWARGS, "do_sample": draw}
    torch.manual_seed(5)
    expected, after = llama.generate(**BATCH, **kwargs), torch.rand(2)
    handle = hf_paged.patch(llama, on_unsupported="error")
    original, closed = ModelEngines.get, []

    def get(self: ModelEngines) -> Any:
        built, thread = original(self)
        if not closed:
            closed.append(thread)
            thread.close()
            self._engines.clear()
        return built, thread

    monkeypatch.setattr(ModelEngines, "get", get)
    torch.manual_seed(5)
    same_tensor(llama.generate(**BATCH, **kwargs), expected)
    assert torch.equal(torch.rand(2), after)
    assert handle.stats.reserved_tokens > 0


@pytest.mark.parametrize("draw", [False, True])
def test_a_call_that_is_unpatched_before_it_begins_is_stocks(
    llama: PreTrainedModel, draw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = {**KWARGS, "do_sample": draw}
    torch.manual_seed(5)
    expected, after = llama.generate(**BATCH, **kwargs), torch.rand(2)
    hf_paged.patch(llama, on_unsupported="error")
    original = EngineThread.call

    def call(self: EngineThread, requests: Any) -> Any:
        hf_paged.unpatch(llama)
        return original(self, requests)

    monkeypatch.setattr(EngineThread, "call", call)
    torch.manual_seed(5)
    with caught() as warned:
        same_tensor(llama.generate(**BATCH, **kwargs), expected)
    assert torch.equal(torch.rand(2), after)
    assert not warned


def test_a_call_that_its_caller_has_seen_a_part_of_is_told(llama: PreTrainedModel) -> None:
    """It can't begin again: its processor would be called twice for a token."""

    class Unpatch(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            hf_paged.unpatch(llama)
            return scores

    hf_paged.patch(llama)
    with pytest.raises(hf_paged.RequestAbortedError):
        llama.generate(**BATCH, **KWARGS, logits_processor=[Unpatch()])


def test_paged_on_a_model_that_others_patch(llama: PreTrainedModel) -> None:
    expected = llama.generate(**BATCH, **KWARGS)
    wrong: list[Any] = []

    def visit() -> None:
        for _ in range(8):
            try:
                with hf_paged.paged(llama):
                    if not torch.equal(llama.generate(**BATCH, **KWARGS), expected):
                        wrong.append("another answer")
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert "generate" not in vars(llama)


class During:
    """A streamer in whose first call something happens."""

    def __init__(self, work: Any) -> None:
        self.got: list[Any] = []
        self._work = work

    def put(self, value: torch.Tensor) -> None:
        if not self.got:
            thread = threading.Thread(target=self._work)
            thread.start()
            thread.join()
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_a_streamer_hears_a_call_once_that_is_begun_again(llama: PreTrainedModel, monkeypatch: Any) -> None:
    """The engine is closed after the call was prepared: another one answers, and the prompt isn't streamed twice."""
    expected = During(lambda: None)
    llama.generate(BATCH["input_ids"][:1], streamer=expected, **KWARGS)
    hf_paged.patch(llama, on_unsupported="error")
    llama.generate(BATCH["input_ids"][:1], **KWARGS)
    entered, original = [], EngineThread.enter

    def enter(self: EngineThread, *arguments: Any) -> Any:
        if not entered:
            entered.append(self)
            self.close()
        return original(self, *arguments)

    monkeypatch.setattr(EngineThread, "enter", enter)
    got = During(lambda: None)
    llama.generate(BATCH["input_ids"][:1], streamer=got, **KWARGS)
    assert got.got == expected.got
    assert entered


def test_an_engine_that_its_user_closed_is_replaced(llama: PreTrainedModel) -> None:
    expected = answer(llama, "greedy")
    handle = hf_paged.patch(llama, on_unsupported="error")
    assert answer(llama, "greedy") == expected
    handle.thread().close()
    assert answer(llama, "greedy") == expected
    assert handle.stats.pool_bytes == 0


def test_an_engine_that_is_closed_as_a_call_enters(llama: PreTrainedModel, monkeypatch: Any) -> None:
    """Another thread's call sees that the model's structure changed, and no call inside; then this one enters."""
    expected = answer(llama, "greedy")
    hf_paged.patch(llama, on_unsupported="error")
    assert answer(llama, "greedy") == expected
    entered, original = [], EngineThread.enter

    def enter(self: EngineThread, *arguments: Any) -> Any:
        queue = original(self, *arguments)
        if not entered:
            entered.append(self)
            self.close()
        return queue

    monkeypatch.setattr(EngineThread, "enter", enter)
    assert answer(llama, "greedy") == expected
    assert entered
