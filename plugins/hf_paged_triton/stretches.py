"""A step's rows in stretches: neighbours that one launch serves."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from hf_paged.types import Batch

TABLE_STEP = 16
# With fewer tokens, prompts are read through their block tables too: that costs 3 % of their attention on an H100,
# and saves the compilation of a second kernel, seconds, before a first answer.
FRESH_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Neighbouring rows, at least one.

    Attributes:
        tokens: where their queries are in the flat batch.
        query_start_loc: int32 [rows + 1], where each row's tokens begin, counted from the first one's.
        seq_lens: int32 [rows], tokens of each row that have keys after this step.
        block_tables: for each cache group int32 [rows, blocks].
    """

    tokens: slice
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: list[torch.Tensor]


def one_stretch(batch: Batch) -> tuple[None, Stretch | None, None]:
    """All rows as rows between: one kernel, and one way to add a token's keys up, whatever its row is."""
    starts = batch.row_starts
    if len(starts) == 1:
        return None, None, None
    tables = [_table(table) for table in batch.block_tables]
    return None, Stretch(slice(0, starts[-1]), batch.query_start_loc, batch.seq_lens, tables), None


def stretches(batch: Batch) -> tuple[Stretch | None, Stretch | None, Stretch | None]:
    """The leading rows of one query; the last rows, whose keys are all of this step; those between.

    The scheduler puts rows of one query first, and prompts that begin last. Where it doesn't, they are between: slower,
    for that launch reads all keys through block tables with a tile of queries for each row, but as right.

    Returns:
        Decode rows, rows between, fresh rows (if they have FRESH_TOKENS); each None if there are none.
    """
    decode, fresh, starts = batch.num_decode, batch.fresh_from, batch.row_starts
    if starts[-1] - starts[fresh] < FRESH_TOKENS:
        fresh = len(starts) - 1

    def stretch(first: int, last: int) -> Stretch | None:
        if first == last:
            return None
        return Stretch(
            slice(starts[first], starts[last]),
            # Copies, unless they begin where the batch's begin: an address that 16 does not divide is another kernel
            # to Triton, which compiles it in the middle of a run.
            batch.query_start_loc[first : last + 1] - starts[first] if first else batch.query_start_loc[: last + 1],
            batch.seq_lens[first:last].clone() if first else batch.seq_lens[:last],
            [_table(table[first:last]) for table in batch.block_tables],
        )

    return stretch(0, decode), stretch(decode, fresh), stretch(fresh, len(starts) - 1)


def _table(table: torch.Tensor) -> torch.Tensor:
    """The table with a width that is a multiple of 16, for the same reason; new columns name the null block."""
    missing = -table.shape[1] % TABLE_STEP
    return functional.pad(table, (0, missing)) if missing else table
