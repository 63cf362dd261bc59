"""Ids and attention masks: what is known is carried with stock's result, what isn't is stock's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stock import assert_same, build, caught, padded, same_tensor
from transformers import PreTrainedModel

import hf_paged
import zoo

KWARGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
ROWS = zoo.prompts(4, (20, 13, 7))
IDS = torch.tensor(ROWS[:1])


def outcome(model: PreTrainedModel, **kwargs: Any) -> Any:
    """The tokens of a call, or what it raises."""
    try:
        return model.generate(**kwargs, **KWARGS).tolist()
    except Exception as error:
        return type(error), str(error)


UNKNOWN: dict[str, Any] = {
    "too short": torch.ones(1, 10, dtype=torch.long),
    "too short, with zeros": torch.tensor([[0] * 3 + [1] * 7]),
    "of one column": torch.ones(1, 1, dtype=torch.long),
    "too long": torch.ones(1, 24, dtype=torch.long),
    "too long, with zeros": torch.tensor([[0] * 5 + [1] * 19]),
    "of another number of rows": torch.ones(3, 20, dtype=torch.long),
    "of one dimension": torch.ones(20, dtype=torch.long),
    "of three dimensions": torch.ones(1, 20, 20, dtype=torch.long),
    "of four dimensions": torch.ones(1, 1, 20, 20, dtype=torch.long),
    "twos": torch.full((1, 20), 2),
    "a two": torch.tensor([[1] * 9 + [2] + [1] * 10]),
    "minus ones": torch.full((1, 20), -1),
    "halves": torch.full((1, 20), 0.5),
    "a half": torch.tensor([[1.0] * 9 + [0.5] + [1.0] * 10]),
    "additive": torch.tensor([[-1e9] * 3 + [0.0] * 17]),
    "not a number": torch.full((1, 20), float("nan")),
    "a list": [[1] * 20],
    "all zeros": torch.zeros(1, 20, dtype=torch.long),
    "the last token hidden": torch.tensor([[1] * 19 + [0]]),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_mask_of_another_shape_or_value_is_stocks(llama: PreTrainedModel, kind: str) -> None:
    """The same tokens, or the same error."""
    mask = UNKNOWN[kind]
    expected = outcome(llama, input_ids=IDS, attention_mask=mask)
    hf_paged.patch(llama)
    with caught() as warned:
        assert outcome(llama, input_ids=IDS, attention_mask=mask) == expected
    if kind not in ("all zeros",) or isinstance(expected, list):
        assert len(warned) == 1
        assert "NOTHING" not in warned[0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float16])
def test_a_mask_of_zeros_and_ones_in_any_dtype_is_carried(llama: PreTrainedModel, dtype: torch.dtype) -> None:
    batch = padded(ROWS)
    try:
        stock = llama.generate(batch["input_ids"], attention_mask=batch["attention_mask"].to(dtype), **KWARGS)
    except Exception:
        pytest.fail(f"stock takes no masks of {dtype}: leave it out of the list")
    handle = hf_paged.patch(llama, on_unsupported="error")
    got = llama.generate(batch["input_ids"], attention_mask=batch["attention_mask"].to(dtype), **KWARGS)
    same_tensor(got, stock)
    assert handle.stats.reserved_tokens > 0


def gaps(rows: list[list[int]], holes: list[list[int]]) -> dict[str, torch.Tensor]:
    batch = padded(rows)
    for row, hidden in enumerate(holes):
        batch["attention_mask"][row, hidden] = 0
    return batch


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "deepseek_v3", "olmo", "granite", "gpt_neox"])
@pytest.mark.parametrize("holes", [[[4], [], []], [[3, 4, 5], [9, 12, 15], [13, 18]], [[1, 18], [7, 8], [13]]])
def test_tokens_hidden_between_others_are_left_out(family: str, holes: list[list[int]]) -> None:
    """What stock computes is what dropping them computes."""
    model = build(family)
    batch = gaps(ROWS, holes)
    assert_same(model, **batch, **KWARGS)
    assert_same(model, **batch, max_new_tokens=6, do_sample=True, repetition_penalty=1.4)


def test_gaps_that_a_window_would_count_are_stocks() -> None:
    """Stock measures a window in columns, the hidden ones counted: the answer is another one there."""
    model = build("mistral")
    batch = gaps(ROWS, [[4, 5, 6], [], [14]])
    expected = model.generate(**batch, **KWARGS)
    hf_paged.patch(model)
    with caught() as warned:
        same_tensor(model.generate(**batch, **KWARGS), expected)
    assert len(warned) == 1
    assert "zeros between ones" in warned[0]
    model.config.sliding_window = 512
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 512
    hf_paged.unpatch(model)
    assert_same(model, **batch, **KWARGS)


def test_the_returned_cache_knows_of_gaps(llama: PreTrainedModel) -> None:
    batch = gaps(ROWS, [[4], [9, 12], [14]])
    got, expected = assert_same(llama, **batch, **KWARGS, return_dict_in_generate=True)
    for ours, stocks in zip(got[-1].layers, expected[-1].layers, strict=True):
        torch.testing.assert_close(ours.keys, stocks.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, stocks.values, rtol=1e-4, atol=1e-5)


IDS_OF_KINDS: dict[str, Any] = {
    "no rows": torch.zeros(0, 5, dtype=torch.long),
    "no columns": torch.zeros(2, 0, dtype=torch.long),
    "nothing at all": torch.zeros(0, 0, dtype=torch.long),
    "one dimension": torch.tensor([5, 6, 7]),
    "three dimensions": torch.tensor([[[5, 6, 7]]]),
    "floating point": torch.tensor([[5.0, 6.0]]),
    "a list": [[5, 6, 7]],
    "int32": torch.tensor([[5, 6, 7]], dtype=torch.int32),
    "uint8": torch.tensor([[5, 6, 7]], dtype=torch.uint8),
}


@pytest.mark.parametrize("kind", IDS_OF_KINDS)
def test_ids_of_another_kind_give_what_stock_gives(llama: PreTrainedModel, kind: str) -> None:
    expected = outcome(llama, input_ids=IDS_OF_KINDS[kind])
    hf_paged.patch(llama, on_unsupported="silent")
    got = outcome(llama, input_ids=IDS_OF_KINDS[kind])
    if kind == "no columns":  # stock's error names its tensors
        assert got[0] in (expected[0], hf_paged.InvalidRequestError)
    else:
        assert got == expected
