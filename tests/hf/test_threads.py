"""Callers from many threads meet in one batch, and each gets the answer it would have got alone."""

from __future__ import annotations

import ctypes
import faulthandler
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stock import free, padded, snapshot
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

import hf_paged
import zoo

THREADS = 64
ENDS = list(range(20, 60))


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A hang shows where each thread is, and ends the run."""
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Boom(Exception):
    pass


class Raise(LogitsProcessor):
    """Raises at its n-th call, as a processor or a streamer."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.put(input_ids)
        return scores

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise Boom

    def end(self) -> None:
        pass


class RaiseAsCriterion(Raise, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Bias(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.token] += 2.0
        return scores


class Collect:
    def __init__(self) -> None:
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        self.count += 1

    def end(self) -> None:
        pass


def arguments(index: int) -> dict[str, Any]:
    """The call of one thread, without anything that is drawn at random."""
    rows = zoo.prompts(index, [1 + (index * 7 + row * 5) % 30 for row in range(1 + index % 3)])
    kinds: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3, "eos_token_id": ENDS},
        {"logits_processor": [Bias(index + 3)]},
        {"no_repeat_ngram_size": 2},
        {"streamer": Collect()},
        {"return_dict_in_generate": True, "output_scores": True},
        {"eos_token_id": ENDS},
        {"num_beams": 2},  # stock's, in the middle of all
    ]
    return {**padded(rows), "max_new_tokens": 6 + index % 11, "do_sample": False, **kinds[index % len(kinds)]}


def tokens(result: Any) -> list[list[int]]:
    return (result if isinstance(result, torch.Tensor) else result.sequences).tolist()


def raising(index: int) -> dict[str, Any]:
    trap, criterion = Raise(index % 5), RaiseAsCriterion(index % 5)
    where = ({"streamer": trap}, {"logits_processor": [trap]}, {"stopping_criteria": [criterion]})[index // 4 % 3]
    return {**padded(zoo.prompts(index, (9, 4))), "max_new_tokens": 12, "do_sample": False, **where}


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_seqs": 8, "block_size": 4, "num_blocks": 60, "max_num_batched_tokens": 24}],
    ids=["roomy", "tight"],
)
def test_64_threads(llama: PreTrainedModel, options: dict[str, Any]) -> None:
    """Every fourth raises, every fourth is interrupted; the others get their sequential answers."""
    before = snapshot(llama)
    expected = {i: tokens(llama.generate(**arguments(i))) for i in range(THREADS) if i % 4 < 2}
    outcomes: dict[int, Any] = {}
    gate = threading.Barrier(THREADS + 1)
    random.seed(0)

    def work(index: int) -> None:
        try:
            gate.wait()
            if index % 4 == 2:
                llama.generate(**raising(index))
            elif index % 4 == 3:  # interrupted somewhere on the way; the rest of a thread's life is its own
                for _ in range(1000):
                    llama.generate(**{**arguments(index), "max_new_tokens": 40})
            else:
                outcomes[index] = tokens(llama.generate(**arguments(index)))
        except (Boom, KeyboardInterrupt) as error:
            outcomes[index] = type(error)

    with hf_paged.paged(llama, on_unsupported="silent", **options) as handle:
        llama.generate(**arguments(0))
        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        gate.wait()
        for index in range(3, THREADS, 4):
            time.sleep(random.random() * 0.05)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(threads[index].ident), ctypes.py_object(KeyboardInterrupt)
            )
        for thread in threads:
            thread.join(200)
        assert not any(thread.is_alive() for thread in threads)
        assert {i: outcomes[i] for i in expected} == expected
        assert {outcomes[i] for i in range(2, THREADS, 4)} == {Boom}
        assert {outcomes[i] for i in range(3, THREADS, 4)} == {KeyboardInterrupt}
        assert free(handle.stats)
        assert tokens(llama.generate(**arguments(1))) == expected[1]
        assert free(handle.stats)
    assert handle.stats.pool_bytes == 0
    assert snapshot(llama) == before


def test_they_share_one_batch(llama: PreTrainedModel) -> None:
    """Sixteen callers take far fewer forwards than one after the other."""
    forwards = [0]

    def count(*_: Any) -> None:
        forwards[0] += 1

    call = {
        "input_ids": torch.tensor(zoo.prompts(0, (8,))),
        "max_new_tokens": 30,
        "do_sample": False,
        "eos_token_id": None,
    }
    with hf_paged.paged(llama, on_unsupported="error"):
        llama.generate(**call)
        llama.register_forward_pre_hook(count)
        gate = threading.Barrier(16)

        def work() -> None:
            gate.wait()
            llama.generate(**call)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    assert 30 <= forwards[0] < 16 * 30 / 2


def test_sampling_threads_draw_different_numbers(llama: PreTrainedModel) -> None:
    call = {
        "input_ids": torch.tensor(zoo.prompts(0, (8,))),
        "max_new_tokens": 20,
        "do_sample": True,
        "eos_token_id": None,
    }
    answers: list[tuple[int, ...]] = []
    hf_paged.patch(llama, on_unsupported="error")
    gate = threading.Barrier(8)

    def work() -> None:
        gate.wait()
        answers.append(tuple(llama.generate(**call)[0].tolist()))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert len(answers) == 8
    assert len(set(answers)) == 8


def test_modes_of_threads_are_their_own(llama: PreTrainedModel) -> None:
    """Autocast, inference mode and grad mode of one caller don't reach another's answer."""
    batch = padded(zoo.prompts(3, (12, 5)))
    call: dict[str, Any] = {
        **batch,
        "max_new_tokens": 25,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    exact = llama.generate(**call)
    errors: list[str] = []

    def plain() -> None:
        for _ in range(4):
            got = llama.generate(**call)
            if got.sequences.tolist() != exact.sequences.tolist() or got.logits[0].is_inference():
                errors.append("plain")
            if not torch.allclose(got.logits[-1], exact.logits[-1], atol=1e-4) or not torch.is_grad_enabled():
                errors.append("logits")

    def half() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(4):
                got = llama.generate(**call)
                if torch.allclose(got.logits[0], exact.logits[0], atol=1e-5):
                    errors.append("autocast was lost")

    def inference() -> None:
        with torch.inference_mode():
            got = [llama.generate(**call).sequences for _ in range(4)]
            errors.extend("inference" for one in got if not one.is_inference())

    with hf_paged.paged(llama, on_unsupported="error") as handle:
        threads = [threading.Thread(target=work, daemon=True) for work in (plain, half, inference, plain)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive()
        assert free(handle.stats)
    assert not errors


@pytest.mark.parametrize("kind", ["greedy", "with a processor"])
def test_a_call_is_aborted_from_another_thread(llama: PreTrainedModel, kind: str) -> None:
    handle = hf_paged.patch(llama, on_unsupported="error")
    more = {"logits_processor": [Bias(3)]} if kind == "with a processor" else {}
    call = {"input_ids": torch.tensor(zoo.prompts(0, (8,))), "do_sample": False, "eos_token_id": None, **more}
    expected = tokens(llama.generate(**call, max_new_tokens=8))
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(llama.generate(**call, max_new_tokens=400))
        except hf_paged.RequestAbortedError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while handle.abort(thread) == 0 and thread.is_alive():
        time.sleep(0.001)
    thread.join(100)
    assert [type(result) for result in results] == [hf_paged.RequestAbortedError]
    assert handle.abort() == 0
    assert free(handle.stats)
    assert tokens(llama.generate(**call, max_new_tokens=8)) == expected


def test_steps_compute_under_the_callers_autocast(llama: PreTrainedModel) -> None:
    seen: list[Any] = []
    head = llama.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    hf_paged.patch(llama, on_unsupported="error")
    call = {"input_ids": torch.tensor(zoo.prompts(0, (8,))), "do_sample": False, "max_new_tokens": 4}
    llama.generate(**call)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        llama.generate(**call)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    llama.generate(**call)
    assert set(seen) == {torch.float32}


def test_a_dispatch_mode_of_the_callers_sees_what_stock_computes(llama: PreTrainedModel) -> None:
    """It is in force in the caller's thread alone."""
    call = {"input_ids": torch.tensor(zoo.prompts(0, (8,))), "do_sample": False, "max_new_tokens": 4}

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            llama.generate(**call)
        return counter.get_total_flops()

    expected = flops()
    hf_paged.patch(llama)
    with pytest.warns(UserWarning, match="torch mode"):
        assert flops() == expected > 0


def test_a_function_mode_of_the_callers_sees_what_stock_computes(llama: PreTrainedModel) -> None:
    call = {"input_ids": torch.tensor(zoo.prompts(0, (8,))), "do_sample": False, "max_new_tokens": 4}

    class Count(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func is torch.nn.functional.linear
            return func(*args, **(kwargs or {}))

    def calls() -> int:
        with Count() as mode:
            llama.generate(**call)
        return mode.calls

    expected = calls()
    hf_paged.patch(llama)
    with pytest.warns(UserWarning, match="torch mode"):
        assert calls() == expected > 0


def test_under_a_default_device_it_is_carried(llama: PreTrainedModel) -> None:
    call = {"input_ids": torch.tensor(zoo.prompts(0, (8,))), "do_sample": False, "max_new_tokens": 4}
    expected = tokens(llama.generate(**call))
    with hf_paged.paged(llama, on_unsupported="error"), torch.device("cpu"):
        assert tokens(llama.generate(**call)) == expected


def test_steps_use_as_many_threads_as_their_caller(llama: PreTrainedModel) -> None:
    """Torch counts them for each thread, and the owner thread outlives a call."""
    call = {"input_ids": torch.tensor(zoo.prompts(0, (8,))), "do_sample": False, "max_new_tokens": 2}
    seen: list[int] = []
    llama.get_output_embeddings().register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        with hf_paged.paged(llama, on_unsupported="error"):
            for count in (1, 2, 1):
                torch.set_num_threads(count)
                llama.generate(**call)
                seen.clear()
                llama.generate(**call)
                assert set(seen) == {count}
    finally:
        torch.set_num_threads(before)


def test_ctrl_c_strikes_at_once() -> None:
    """A real SIGINT, in the main thread, while it waits for a long answer; the next call is answered."""
    program = """
import _thread, threading, time, torch, zoo, hf_paged
model = zoo.build("llama")
handle = hf_paged.patch(model, on_unsupported="error")
ids = torch.tensor(zoo.prompts(0, (8,)))
expected = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
threading.Timer(0.3, _thread.interrupt_main).start()
try:
    while True:
        model.generate(ids, max_new_tokens=480, min_new_tokens=480, do_sample=False)
except KeyboardInterrupt:
    print("interrupted", handle.stats.pool_bytes)
assert model.generate(ids, max_new_tokens=5, do_sample=False).tolist() == expected
print("answered")
"""
    where = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", program], cwd=where, timeout=200, capture_output=True, text=True)
    assert found.stdout.split() == ["interrupted", "0", "answered"], found.stderr
