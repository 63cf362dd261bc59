"""`generate()` over left-padded batches: what people run today."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hf_paged.bench.run import KVUse, Run, cache_bytes, written
from hf_paged.bench.workloads import Item
from hf_paged.hf.compat import cache_of

NO_END: frozenset[int] = frozenset()
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}  # whatever the generation config says


def generate(
    model: Any, items: Sequence[Item], pad: int, eos: frozenset[int] = NO_END, how: Mapping[str, Any] = GREEDY
) -> tuple[list[list[int]], Any]:
    """One call, until its longest row is done.

    Args:
        model: a Transformers model, patched or not.
        items: the requests.
        pad: the id to pad with, on the left.
        eos: ids that end a row. Empty: every row runs to its length.
        how: further arguments of `generate()`.

    Returns:
        The useful tokens of each row, and what `generate()` returned, with a cache where there is one.
    """
    width = max(len(item.prompt_token_ids) for item in items)
    gaps = [width - len(item.prompt_token_ids) for item in items]
    ids = [[pad] * gap + list(item.prompt_token_ids) for gap, item in zip(gaps, items, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    result = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(item.max_tokens for item in items),
        eos_token_id=sorted(eos) or None,
        pad_token_id=pad,
        **how,
    )
    rows = (result if isinstance(result, torch.Tensor) else result.sequences)[:, width:].tolist()
    return [useful(row[: item.max_tokens], eos) for item, row in zip(items, rows, strict=True)], result


def run(
    model: Any,
    items: Sequence[Item],
    batch_size: int,
    pad: int,
    eos: frozenset[int] = NO_END,
    done: Callable[[int], None] = lambda count: None,
) -> Run:
    """Generate greedily with stock `generate()`, a batch after the other.

    Args:
        model: not patched.
        batch_size: rows of a batch.
        done: told after each batch how many requests are done.
    """
    outputs: list[list[int]] = []
    reserved = used = peak = 0
    began = time.perf_counter()
    for first in range(0, len(items), batch_size):
        batch = items[first : first + batch_size]
        new, result = generate(model, batch, pad, eos, GREEDY | {"return_dict_in_generate": True})
        outputs += new
        reserved += len(batch) * written(result.sequences.shape[1], 0)
        used += sum(written(len(item.prompt_token_ids), len(row)) for item, row in zip(batch, new, strict=True))
        peak = max(peak, cache_bytes(cache_of(result)))
        del result  # or the next batch would find two caches in memory
        done(len(outputs))
    return Run(time.perf_counter() - began, outputs, KVUse(reserved, used, peak))


def useful(row: Sequence[int], eos: frozenset[int]) -> list[int]:
    """A row up to and including the id that ends it."""
    end = next((index for index, token in enumerate(row) if token in eos), len(row))
    return list(row[: end + 1])
