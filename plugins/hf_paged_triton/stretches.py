"""A step's rows in stretches: neighbouring rows that one launch serves."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional

from hf_paged.batch import Batch

TABLE_STEP = 16
# Fewer fresh tokens are read through their block tables too: that costs 3 % of their attention on an H100, and saves
# compiling a second kernel, for seconds, before the first answer.
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
    """All rows in the middle stretch: one kernel, which adds up a token's keys in the same order in any row."""
    starts = batch.row_starts
    if len(starts) == 1:
        return None, None, None
    tables = [_table(table) for table in batch.block_tables]
    return None, Stretch(slice(0, starts[-1]), batch.query_start_loc, batch.seq_lens, tables), None


def stretches(batch: Batch) -> tuple[Stretch | None, Stretch | None, Stretch | None]:
    """Split the rows: the leading rows of one query; the last rows, whose keys are all of this step; those between.

    The scheduler puts rows of one query first, and prompts that begin last. Rows in another place are in the middle
    stretch, which is slower, since it reads all keys through block tables with a tile of queries for each row.

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
            # Copied unless they begin where the batch's begin: for an address that is no multiple of 16, Triton
            # compiles another kernel, in the middle of a run.
            batch.query_start_loc[first : last + 1] - starts[first] if first else batch.query_start_loc[: last + 1],
            batch.seq_lens[first:last].clone() if first else batch.seq_lens[:last],
            [_table(table[first:last]) for table in batch.block_tables],
        )

    return stretch(0, decode), stretch(decode, fresh), stretch(fresh, len(starts) - 1)


def _table(table: torch.Tensor) -> torch.Tensor:
    """The table with a width that is a multiple of 16, for the same reason; new columns hold the null block."""
    missing = -table.shape[1] % TABLE_STEP
    return functional.pad(table, (0, missing)) if missing else table
