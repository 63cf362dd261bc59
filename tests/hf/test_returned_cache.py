"""The cache that `generate(return_dict_in_generate=True)` returns is stock's: in class, content and independence."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stock import assert_same, both, build, caught, padded, same_tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel

import hf_paged
import zoo
from hf_paged.hf.compat import cache_of, with_cache

BATCH = padded(zoo.prompts(5, (11, 4, 7)))
KWARGS: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)


def assert_same_cache(got: Any, expected: Any) -> None:
    """Key for key, those of hidden and of padded tokens too."""
    assert got.get_seq_length() == expected.get_seq_length()
    assert type(got) is type(expected)
    for ours, stocks in zip(got.layers, expected.layers, strict=True):
        assert type(ours) is type(stocks)
        torch.testing.assert_close(ours.keys, stocks.keys, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(ours.values, stocks.values, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("eos", [None, "early"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "deepseek_v3", "mixtral", "gpt_oss"])
def test_it_holds_what_stocks_holds(family: str, eos: str | None) -> None:
    model = build(family)
    ends = None
    if eos:  # a row ends early, and goes on with padding
        ends = int(model.generate(**BATCH, **{**KWARGS, "eos_token_id": None}).sequences[1, 13])
    (expected, _), (got, _) = both(model, **BATCH, **KWARGS, eos_token_id=ends)
    assert_same_cache(cache_of(got), cache_of(expected))


def generate(model: PreTrainedModel) -> Any:
    return cache_of(model.generate(**BATCH, **KWARGS, eos_token_id=None))


def saved(cache: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, copy.copy, pickled, saved, lambda cache: copy.deepcopy([cache])[0]]


@pytest.mark.parametrize("make", COPIES, ids=["deepcopy", "copy", "pickle", "torch.save", "inside a list"])
def test_a_copy_stands_on_its_own(llama: PreTrainedModel, make: Any) -> None:
    """The conversation forks there: the copy outlives weights and model."""
    expected = generate(llama)
    hf_paged.patch(llama, on_unsupported="error")
    twin = make(generate(llama))
    with torch.no_grad():
        llama.lm_head.weight.neg_()
        llama.model.layers[0].self_attn.k_proj.weight.neg_()
    assert_same_cache(twin, expected)


def test_it_doesnt_keep_the_model_once_it_was_looked_at() -> None:
    model = zoo.build("llama")
    hf_paged.patch(model, on_unsupported="error")
    cache = generate(model)
    assert cache.get_seq_length() == 18
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert cache.layers[0].keys.shape[2] == 18


def test_copies_are_as_small_as_stocks(llama: PreTrainedModel) -> None:
    stock = generate(llama)
    hf_paged.patch(llama, on_unsupported="error")
    ours = generate(llama)
    assert len(pickle.dumps(ours)) == pytest.approx(len(pickle.dumps(stock)), rel=0.02)


def test_printing_it_computes_nothing(llama: PreTrainedModel) -> None:
    hf_paged.patch(llama, on_unsupported="error")
    cache = generate(llama)
    forwards: list[int] = []
    hook = llama.register_forward_pre_hook(lambda *args: forwards.append(1))
    assert "3 rows of 18 tokens" in repr(cache)
    assert "3 rows" in f"{cache!s} {[cache]}"
    assert not forwards
    assert isinstance(cache, DynamicCache)
    assert not forwards
    hook.remove()


FIRST_USES: dict[str, Callable[[Any], Any]] = {
    "get_seq_length": lambda cache: cache.get_seq_length(),
    "layers": lambda cache: len(cache.layers),
    "crop": lambda cache: cache.crop(-2),
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "update": lambda cache: cache.update(torch.zeros(3, 2, 1, 16), torch.zeros(3, 2, 1, 16), 0),
    "reset": lambda cache: cache.reset(),
    "is_compileable": lambda cache: cache.is_compileable,
    "get_mask_sizes": lambda cache: cache.get_mask_sizes(1, 0),
    "vars": lambda cache: [cache.layers and None, sorted(vars(cache))],
}


@pytest.mark.parametrize("use", FIRST_USES)
def test_whatever_looks_first_sees_the_whole(llama: PreTrainedModel, use: str) -> None:
    stock = generate(llama)
    hf_paged.patch(llama, on_unsupported="error")
    ours = generate(llama)
    got, expected = FIRST_USES[use](ours), FIRST_USES[use](stock)
    if not isinstance(got, tuple):
        assert got == expected
    assert type(ours) is DynamicCache
    if use != "reset":
        assert_same_cache(ours, stock)


def test_what_is_set_before_the_first_use_stays(llama: PreTrainedModel) -> None:
    stock = generate(llama)
    hf_paged.patch(llama, on_unsupported="error")
    ours = generate(llama)
    ours.note = 5
    assert ours.note == 5
    assert_same_cache(ours, stock)
    assert vars(ours).keys() == {*vars(stock), "note"}
    assert ours.note == 5


def test_two_threads_at_the_first_use(llama: PreTrainedModel) -> None:
    forwards, found, both_inside = [], [], threading.Barrier(2)

    def wait(*_: Any) -> None:
        forwards.append(1)
        if armed:
            with contextlib.suppress(threading.BrokenBarrierError):
                both_inside.wait(0.5)

    armed, hook = False, llama.register_forward_pre_hook(wait)
    hf_paged.patch(llama, on_unsupported="error")
    ours = generate(llama)
    armed = bool(forwards)
    forwards.clear()
    threads = [threading.Thread(target=lambda: found.append(ours.layers)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert found[0] is found[1] is ours.layers
    assert len(forwards) == 2  # the prompts, then the rest: once


def test_a_conversation_goes_on_with_a_fork(llama: PreTrainedModel) -> None:
    """Transformers' recipe: copy the cache of a prefix for each question."""
    ids = BATCH["input_ids"][:1]
    hf_paged.patch(llama)
    result = llama.generate(ids, **KWARGS, eos_token_id=None)
    answers = []
    for question in zoo.prompts(8, (3, 5)):
        longer = torch.cat([result.sequences, torch.tensor([question])], dim=-1)
        fork = copy.deepcopy(cache_of(result))
        with caught():
            answers.append(llama.generate(longer, **with_cache(fork), max_new_tokens=4, do_sample=False).tolist())
        hf_paged.unpatch(llama)
        assert answers[-1] == llama.generate(longer, max_new_tokens=4, do_sample=False).tolist()
        hf_paged.patch(llama)


@pytest.mark.parametrize("implementation", ["static", "hybrid", "sliding_window", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_cache_asked_for_by_name_is_of_that_class(family: str, implementation: str) -> None:
    """Whether the engine carries the call or stock does."""
    model = build(family)
    kwargs = {**KWARGS, "cache_implementation": implementation, "disable_compile": True}
    expected = model.generate(**BATCH, **kwargs)
    hf_paged.patch(model, on_unsupported="silent")
    got = model.generate(**BATCH, **kwargs)
    same_tensor(got.sequences, expected.sequences)
    assert cache_of(got).is_compileable == cache_of(expected).is_compileable
    assert type(cache_of(got)) is type(cache_of(expected))


def test_a_static_cache_that_nobody_gets_is_the_engines(llama: PreTrainedModel) -> None:
    plain = {**KWARGS, "return_dict_in_generate": False}
    assert_same(llama, **BATCH, **plain, cache_implementation="static", disable_compile=True)


def test_a_compiled_forward_that_is_asked_for_is_stocks(llama: PreTrainedModel) -> None:
    hf_paged.patch(llama, on_unsupported="error")
    with pytest.raises(hf_paged.UnsupportedCallError, match="compile_config asks for a compiled forward"):
        llama.generate(**BATCH, **KWARGS, compile_config=CompileConfig(backend="eager"))
