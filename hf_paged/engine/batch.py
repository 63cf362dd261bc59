"""Step -> Batch: the tensors of one forward."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from hf_paged.types import Batch, Scheduled, Step


def build(step: Step, block_size: int, num_groups: int, device: torch.device) -> Batch:
    """The tensors of a step; see `Batch` for their shapes."""
    rows = step.rows
    counts = [row.count for row in rows]
    ids = [token for row in rows for token in row.request.token_ids[row.start : row.end]]
    positions = list(itertools.chain.from_iterable(range(row.start, row.end) for row in rows))
    ends = list(itertools.accumulate(counts, initial=0))
    tables = [[row.request.tables[group] for row in rows] for group in range(num_groups)]
    return Batch(
        rows=rows,
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        query_start_loc=torch.tensor(ends, dtype=torch.int32, device=device),
        seq_lens=torch.tensor([row.end for row in rows], dtype=torch.int32, device=device),
        slot_mapping=[_slots(rows, group, block_size, device) for group in tables],
        block_tables=[_padded(group, device) for group in tables],
        logits_indices=torch.tensor(_logits_indices(rows, ends), dtype=torch.int64, device=device),
    )


def _slots(
    rows: Sequence[Scheduled], tables: Sequence[Sequence[int]], block_size: int, device: torch.device
) -> torch.Tensor:
    slots: list[int] = []
    for row, table in zip(rows, tables, strict=True):
        for index in range(row.start // block_size, -(-row.end // block_size)):
            # A token's slot is its position moved by as much as its block is.
            base = (table[index] - index) * block_size
            first, last = max(row.start, index * block_size), min(row.end, (index + 1) * block_size)
            slots.extend(range(base + first, base + last))
    return torch.tensor(slots, dtype=torch.int64, device=device)


def _padded(tables: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    width = max((len(table) for table in tables), default=0)
    return torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32, device=device)


def _logits_indices(rows: Sequence[Scheduled], ends: Sequence[int]) -> list[int]:
    """The last token of each row that samples; every token of a row whose prompt's log-probabilities are wanted."""
    indices: list[int] = []
    for row, begin, end in zip(rows, ends, ends[1:], strict=False):
        if wants_prompt_logprobs(row):
            indices.extend(range(begin, end))
        elif row.samples:
            indices.append(end - 1)
    return indices


def wants_prompt_logprobs(row: Scheduled) -> bool:
    """Whether a row asks for the log-probabilities of prompt tokens that it computes, for the first time."""
    request = row.request
    if request.prompt_logprobs is None:
        return False
    return len(request.prompt_logprobs) <= min(row.end, len(request.prompt_token_ids) - 1)
