"""A process that forks while another thread generates: the child generates too."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stock import padded
from torch import nn
from transformers import PreTrainedModel

import hf_paged
import zoo
from hf_paged.hf import handle as handles
from hf_paged.hf.swaps import Swaps

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform doesn't fork")

BATCH = padded(zoo.prompts(2, (9, 4)))
KWARGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
fork = multiprocessing.get_context("fork")


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` gives in a forked child."""
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: send.send(work()))
    child.start()
    try:
        assert receive.poll(60), "the child hangs"
        return receive.recv()
    finally:
        child.kill()
        child.join()


class Slow:
    """Has a thread of the parent inside a step, from the middle of a forward on, for as long as it is held."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.inside, self.release = threading.Event(), threading.Event()
        self._parent = os.getpid()
        self._hook = model.model.layers[1].register_forward_pre_hook(self._wait)
        self.held = False

    def _wait(self, *_: Any) -> None:
        if self.held and os.getpid() == self._parent:
            self.inside.set()
            self.release.wait(60)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("draw", [False, True])
def test_the_child_generates_while_a_thread_of_the_parent_is_inside_a_step(
    llama: PreTrainedModel, keep: bool, draw: bool
) -> None:
    kwargs = {**KWARGS, "do_sample": draw}
    slow = Slow(llama)
    torch.manual_seed(3)
    expected = llama.generate(**BATCH, **kwargs).tolist()
    hf_paged.patch(llama, keep_pool=keep, on_unsupported="error", fusions=True)
    llama.generate(**BATCH, **KWARGS)
    slow.held = True
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(llama.generate(**BATCH, **KWARGS)))
    thread.start()
    assert slow.inside.wait(60)

    def child() -> Any:
        attention = llama.config._attn_implementation
        forwards = [name for name, module in llama.named_modules() if "forward" in vars(module)]
        torch.manual_seed(3)
        answer = llama.generate(**BATCH, **kwargs).tolist()
        hf_paged.unpatch(llama)
        return attention, forwards, answer, "generate" in vars(llama)

    try:
        assert in_child(child) == ("sdpa", [], expected, False)
    finally:
        slow.release.set()
        thread.join(60)
    assert len(answers) == 1  # the parent's own call is not harmed


LOCKS: dict[str, Callable[[Any], Any]] = {
    "patching": lambda handle: handles.lock,
    "building": lambda handle: handle._engines._building,
    "owning the engine": lambda handle: handle.engine()[1]._owned,
}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_that_a_thread_of_the_parent_holds_is_open_in_the_child(llama: PreTrainedModel, name: str) -> None:
    expected = llama.generate(**BATCH, **KWARGS).tolist()
    handle = hf_paged.patch(llama, on_unsupported="error")
    llama.generate(**BATCH, **KWARGS)
    lock = LOCKS[name](handle)
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(60)
    try:
        assert in_child(lambda: llama.generate(**BATCH, **KWARGS).tolist()) == expected
        assert in_child(lambda: hf_paged.explain(zoo.build("gpt2")).path) == "flat"
    finally:
        release.set()
        thread.join(60)


def test_children_while_many_threads_generate(llama: PreTrainedModel) -> None:
    expected = llama.generate(**BATCH, **KWARGS).tolist()
    hf_paged.patch(llama, on_unsupported="error")
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            llama.generate(**BATCH, **KWARGS)

    threads = [threading.Thread(target=generate) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            time.sleep(0.03)
            assert in_child(lambda: llama.generate(**BATCH, **KWARGS).tolist()) == expected
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_a_child_of_a_program_with_an_llm(llama: PreTrainedModel) -> None:
    with hf_paged.LLM(llama, skip_tokenizer_init=True) as llm:
        greedy = hf_paged.SamplingParams(temperature=0.0, max_tokens=6)

        def answer() -> list[int]:
            return llm.generate([[5, 6, 7]], greedy, use_tqdm=False)[0].outputs[0].token_ids

        expected = answer()
        assert in_child(answer) == expected
        assert in_child(lambda: in_child(answer)) == expected
        assert answer() == expected


def test_swaps_are_off_in_a_child() -> None:
    module, swaps = nn.Linear(2, 2), Swaps()
    swaps.add(module, "forward", len)
    with swaps.on():
        assert vars(module)["forward"] is len
        assert in_child(lambda: "forward" in vars(module)) is False
    assert "forward" not in vars(module)
