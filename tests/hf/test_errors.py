"""Errors name the value, the limit and the way out, come before any work is done, and leave nothing behind."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from stock import caught, free, padded, snapshot
from torch import nn
from transformers import PreTrainedModel

import hf_paged
import zoo
from hf_paged import LLM, ConfigError, InvalidRequestError, PagedConfig, SamplingParams

IDS = torch.tensor(zoo.prompts(1, (9,)))


@contextmanager
def refused(model: PreTrainedModel, error: type[Exception], *words: str, looks: int = 0) -> Iterator[None]:
    """An error with these words; no forward is run, but to look at the model, and the model is as it was."""
    before = snapshot(model)
    forwards: list[int] = []
    stock = type(model).forward

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:  # no hook, for whose sake the model would be looked at again
        forwards.append(1)
        return stock(*args, **kwargs)

    with mock.patch.object(type(model), "forward", forward), pytest.raises(error) as raised:
        yield
    for word in words:
        assert word in str(raised.value), str(raised.value)
    assert len(forwards) <= looks
    assert snapshot(model) == before


def warm(model: PreTrainedModel, **options: Any) -> Any:
    """Patched, with its engine built."""
    handle = hf_paged.patch(model, **options)
    model.generate(IDS[:, :2], max_new_tokens=1, do_sample=False)
    return handle


# ------------------------------------------------------------------------------------------------------------- requests


def test_empty_prompt(llama: PreTrainedModel) -> None:
    handle = warm(llama)
    with refused(llama, InvalidRequestError, "prompt is empty", "BOS"):
        llama.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)
    assert handle.stats.pool_bytes == 0
    with LLM(llama, skip_tokenizer_init=True) as llm, refused(llama, InvalidRequestError, "prompt 1", "empty"):
        llm.generate([[5, 6], [], [7]], use_tqdm=False)


@pytest.mark.parametrize("wrong", [256, 100_000, -1])
def test_ids_outside_the_vocabulary(llama: PreTrainedModel, wrong: int) -> None:
    handle = warm(llama)
    ids = IDS.clone()
    ids[0, 3] = wrong
    with refused(llama, InvalidRequestError, str(wrong), "0 to 255", "resize_token_embeddings"):
        llama.generate(ids, max_new_tokens=3)
    assert handle.stats.pool_bytes == 0
    with LLM(llama, skip_tokenizer_init=True) as llm:
        with refused(llama, InvalidRequestError, "prompt 2", str(wrong), "0 to 255"):
            llm.generate([[5], [6], [7, wrong]], use_tqdm=False)
        for name, value in (("allowed_token_ids", [wrong]), ("logit_bias", {wrong: 1.0})):
            with refused(llama, InvalidRequestError, name, str(wrong), "0 to 255"):
                llm.generate([[5]], SamplingParams(**{name: value}), use_tqdm=False)
        assert free(llm.stats)


def test_never_fits_the_pool(llama: PreTrainedModel) -> None:
    handle = warm(llama, block_size=4, num_blocks=4, keep_pool=True)
    with refused(
        llama, InvalidRequestError, "9 prompt tokens", "max_tokens=10", "5 KV blocks", "4 at most", "num_blocks"
    ):
        llama.generate(IDS, max_new_tokens=10)
    assert free(handle.stats)
    assert llama.generate(IDS, max_new_tokens=7, do_sample=False).shape == (1, 16)
    hf_paged.unpatch(llama)
    handle = warm(llama, block_size=4, kv_memory=5 * 4 * 2 * 2 * 2 * 16 * 4)
    with refused(llama, InvalidRequestError, "4 at most", "kv_memory"):
        llama.generate(IDS, max_new_tokens=10)


def test_never_fits_the_positions(llama: PreTrainedModel) -> None:
    with LLM(llama, skip_tokenizer_init=True) as llm:
        with refused(llama, InvalidRequestError, "prompt 0", "500 prompt tokens", "max_tokens=16", "516", "512"):
            llm.generate([5] * 500, use_tqdm=False)
        with refused(llama, InvalidRequestError, "600 prompt tokens", "512"):
            llm.generate([5] * 600, SamplingParams(max_tokens=None), use_tqdm=False)
    with LLM(llama, skip_tokenizer_init=True, max_model_len=20) as llm:
        with refused(llama, InvalidRequestError, "26", "20", "max_model_len"):
            llm.generate([5] * 10, use_tqdm=False)
        assert len(llm.generate([5] * 4, use_tqdm=False)[0].outputs[0].token_ids) <= 16
    warm(llama, max_model_len=20)
    with refused(llama, InvalidRequestError, "20", "max_model_len"):
        llama.generate(IDS, max_new_tokens=12)


def test_one_wrong_row_stops_the_batch_before_it_begins(llama: PreTrainedModel) -> None:
    handle = warm(llama)
    batch = padded([[5, 6, 7], [8, 300, 9, 10]])
    with refused(llama, InvalidRequestError, "300"):
        llama.generate(**batch, max_new_tokens=5)
    assert handle.stats.pool_bytes == 0
    assert llama.generate(IDS, max_new_tokens=3).shape == (1, 12)


# -------------------------------------------------------------------------------------------------------------- options

WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"block_size": 12}, ("block_size", "power of two", "12")),
    ({"block_size": 0}, ("block_size", "0")),
    ({"num_blocks": 0}, ("num_blocks", "at least 1", "0")),
    ({"num_blocks": 2.5}, ("num_blocks", "2.5")),
    ({"max_num_seqs": 0}, ("max_num_seqs", "at least 1")),
    ({"max_num_batched_tokens": -5}, ("max_num_batched_tokens", "-5")),
    ({"max_model_len": "long"}, ("max_model_len", "'long'")),
    ({"kv_memory": 1.5}, ("kv_memory", "1.5", "(0, 1]")),
    ({"kv_memory": 0}, ("kv_memory", "0")),
    ({"num_blocks": 8, "kv_memory": 0.5}, ("num_blocks=8", "kv_memory=0.5", "give one")),
    ({"fusions": "true"}, ("fusions", "True or False", "'true'")),
    ({"on_unsupported": "explode"}, ("on_unsupported", "'explode'", "'warn'", "'error'", "'silent'")),
    ({"num_block": 8}, ("unknown option 'num_block'", "num_blocks")),
]


@pytest.mark.parametrize(
    ("options", "words"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_wrong_options(llama: PreTrainedModel, options: dict[str, Any], words: tuple[str, ...]) -> None:
    for use in (
        lambda: hf_paged.patch(llama, **options),
        lambda: hf_paged.patch(**options),
        lambda: hf_paged.paged(llama, **options).__enter__(),
        lambda: LLM(llama, skip_tokenizer_init=True, **options),
    ):
        with refused(llama, ConfigError, *words):
            use()
    with pytest.raises((ConfigError, TypeError)):
        PagedConfig(**options)


@pytest.mark.parametrize("share", [0, 1.5, -0.1, True, "all", float("nan")])
def test_a_share_of_the_gpu_that_is_none(llama: PreTrainedModel, share: Any) -> None:
    """Also where there is no GPU."""
    with refused(llama, ConfigError, "gpu_memory_utilization", "(0, 1]", repr(share)):
        LLM(llama, skip_tokenizer_init=True, gpu_memory_utilization=share)


@pytest.mark.parametrize("name", ["attention_backend", "scheduler", "cache_policy"])
def test_names_that_nobody_registered(llama: PreTrainedModel, name: str) -> None:
    with refused(llama, ConfigError, name, "nonsense", "known are"):
        hf_paged.patch(llama, **{name: "nonsense"})


def test_a_pool_larger_than_memory(llama: PreTrainedModel) -> None:
    for options, word in (
        ({"num_blocks": 10**9}, "num_blocks=1000000000"),
        ({"kv_memory": 2**60}, f"kv_memory={2**60}"),
    ):
        hf_paged.patch(llama, **options)
        with refused(llama, ConfigError, word, "GiB", "free", "lower it", looks=1):
            llama.generate(IDS, max_new_tokens=2)
        hf_paged.unpatch(llama)
        with refused(llama, ConfigError, word, "GiB", looks=1):
            LLM(llama, skip_tokenizer_init=True, **options)
    hf_paged.patch(llama, kv_memory=100)
    with refused(llama, ConfigError, "kv_memory=100", "two blocks", looks=1):
        llama.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 2.5}, ("temperature", "[0, 2]", "2.5")),
        ({"top_p": 0.0}, ("top_p", "(0, 1]")),
        ({"top_k": -2}, ("top_k", "-2")),
        ({"min_p": 1.5}, ("min_p", "[0, 1]")),
        ({"n": 0}, ("n must be", "0")),
        ({"n": 2, "temperature": 0.0}, ("n=2", "temperature=0.0")),
        ({"presence_penalty": 3.0}, ("presence_penalty", "[-2, 2]")),
        ({"repetition_penalty": 0.0}, ("repetition_penalty", "[0.001, 1000]")),
        ({"max_tokens": 0}, ("max_tokens", "at least 1")),
        ({"max_tokens": 3, "min_tokens": 4}, ("min_tokens=4", "max_tokens=3")),
        ({"logprobs": 21}, ("logprobs", "20")),
        ({"stop": ""}, ("stop", "non-empty")),
        ({"stop": ["x"], "detokenize": False}, ("stop", "detokenize=True")),
        ({"bad_words": [""]}, ("bad_words", "non-empty")),
        ({"allowed_token_ids": []}, ("allowed_token_ids", "no token")),
    ],
)
def test_sampling_params(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        SamplingParams(**options)
    assert all(word in str(raised.value) for word in words), str(raised.value)


# --------------------------------------------------------------------------------------------------------------- models


def test_a_model_that_cannot_be_carried() -> None:
    model = zoo.build("mamba")
    with pytest.raises(hf_paged.UnsupportedModelError, match="recurrent"):
        LLM(model, skip_tokenizer_init=True)
    hf_paged.patch(model, on_unsupported="error")
    with pytest.raises(hf_paged.UnsupportedCallError, match="MambaForCausalLM.*recurrent"):
        model.generate(IDS, max_new_tokens=2)
    hf_paged.unpatch(model)
    hf_paged.patch(model)
    with caught() as warned:
        model.generate(IDS, max_new_tokens=2)
        model.generate(IDS, max_new_tokens=2)
    assert len(warned) == 1
    assert "recurrent" in warned[0]


def test_a_model_whose_layers_changed_is_looked_at_again(llama: PreTrainedModel) -> None:
    """A layer is replaced by one that can't be carried: found out before the call, not in its middle."""

    class Odd(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            return hidden_states.cumsum(1), None

    hf_paged.patch(llama)
    llama.generate(IDS, max_new_tokens=2, do_sample=False)
    llama.model.layers[0].self_attn = Odd()
    with pytest.warns(UserWarning, match="logits on a flat batch"):
        got = llama.generate(IDS, max_new_tokens=2, do_sample=False, use_cache=False)
    hf_paged.unpatch(llama)
    assert got.tolist() == llama.generate(IDS, max_new_tokens=2, do_sample=False, use_cache=False).tolist()


def test_a_non_model() -> None:
    with pytest.raises(hf_paged.UnsupportedModelError, match="takes a Transformers model.*got Linear"):
        hf_paged.patch(nn.Linear(2, 2))
    with pytest.raises(hf_paged.UnsupportedModelError, match="got Linear"):
        LLM(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------ use after close


def test_use_after_close(llama: PreTrainedModel) -> None:
    before = snapshot(llama)
    llm = LLM(llama, skip_tokenizer_init=True)
    llm.generate([5, 6, 7], use_tqdm=False)
    assert llm.stats.pool_bytes > 0
    llm.close()
    llm.close()
    assert snapshot(llama) == before
    for use in (lambda: llm.generate([5], use_tqdm=False), lambda: llm.stats, llm.reset_prefix_cache):
        with pytest.raises(hf_paged.EngineClosedError, match="closed"):
            use()


def test_every_error_has_one_base() -> None:
    for name in hf_paged.__all__:
        value = getattr(hf_paged, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, hf_paged.HFPagedError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(InvalidRequestError, ValueError)
