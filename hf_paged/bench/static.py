"""Stock `generate()` over static, left-padded batches: what people run today."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_paged.bench.kv import KVUse, cache_bytes, written
from hf_paged.bench.run import Run
from hf_paged.bench.workloads import Item
from hf_paged.hf.compat import cache_of


def left_pad(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [len(prompts), longest prompt], int64, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def run(
    model: Any,
    items: Sequence[Item],
    batch_size: int,
    pad: int,
    eos: frozenset[int] = frozenset(),
    done: Callable[[int], None] = lambda count: None,
) -> Run:
    """Generate greedily, a batch after the other, each until its longest row is done.

    Args:
        model: a Transformers model as it comes, not patched.
        items: the requests.
        batch_size: rows of a batch.
        pad: the id to pad with.
        eos: ids that end a row; what follows them is cut off and doesn't count. Empty: every row runs to its length.
        done: told after each batch how many requests are done.
    """
    outputs: list[list[int]] = []
    reserved = used = peak = 0
    began = time.perf_counter()
    for first in range(0, len(items), batch_size):
        batch = items[first : first + batch_size]
        inputs = left_pad([item.prompt_token_ids for item in batch], pad, model.device)
        width = inputs["input_ids"].shape[1]
        longest = max(item.max_tokens for item in batch)
        result = model.generate(**inputs, **greedy(longest, pad, eos), return_dict_in_generate=True)
        rows = result.sequences[:, width:].tolist()
        new = [useful(row[: item.max_tokens], eos) for item, row in zip(batch, rows, strict=True)]
        outputs += new
        reserved += len(batch) * written(width, len(rows[0]))
        used += sum(written(len(item.prompt_token_ids), len(row)) for item, row in zip(batch, new, strict=True))
        peak = max(peak, cache_bytes(cache_of(result)))
        del result  # or the next batch would find two caches in memory
        done(len(outputs))
    return Run(time.perf_counter() - began, outputs, KVUse(reserved, used, peak))


def greedy(max_new_tokens: int, pad: int, eos: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Options of `generate()`, whatever the model's generation config says."""
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "eos_token_id": sorted(eos) or None,
        "pad_token_id": pad,
    }


def useful(row: Sequence[int], eos: frozenset[int]) -> list[int]:
    """A row up to and including the id that ends it."""
    end = next((index for index, token in enumerate(row) if token in eos), len(row))
    return list(row[: end + 1])
