"""Step -> Batch: the tensors of one forward, in one copy to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hf_paged.engine.staging import Staging
from hf_paged.types import Batch, Request, Scheduled, Step

WIDTH_STEP = 16  # so that every row of a table begins where loads of 16 bytes may


class BatchBuilder:
    """Builds batches for one device.

    Args:
        block_size: tokens of a block.
        num_groups: cache groups, each with tables of its own.
        device: where the tensors go.
    """

    def __init__(self, block_size: int, num_groups: int, device: torch.device) -> None:
        self._block_size = block_size
        self._num_groups = num_groups
        self._staging = Staging(device)

    def build(
        self,
        step: Step,
        *,
        padded_rows: int | None = None,
        chosen: torch.Tensor | None = None,
        places: Mapping[Request, int] | None = None,
    ) -> Batch:
        """The tensors of a step; see `Batch` for their shapes.

        Args:
            padded_rows: how many rows the batch shall have; None: those of the step.
            chosen: int64 [n], tokens of the step before that the host doesn't know yet.
            places: for each request whose last token is among them, its index there.
        """
        rows, missing = step.rows, (padded_rows or len(step.rows)) - len(step.rows)
        counts = np.array([row.count for row in rows] + [1] * missing, np.int64)
        first = np.array([row.start for row in rows] + [-1] * missing, np.int64)
        ends = np.concatenate([[0], counts.cumsum()])
        row_of = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(ends[-1]) + (first - ends[:-1])[row_of]
        tables = [
            _padded([row.request.tables[group] for row in rows] + [[]] * missing) for group in range(self._num_groups)
        ]
        fed = _fed(rows, ends, places) if places else []
        num_decode = next((i for i, row in enumerate(rows) if row.count != 1), len(rows))
        wide = [
            _token_ids(rows, missing),
            np.maximum(positions, 0),
            *(self._slots(table, row_of, positions) for table in tables),
            np.array(_logits_indices(rows, ends.tolist()), np.int64),
            np.array(fed, np.int64).reshape(-1, 2).T,
        ]
        narrow = [ends.astype(np.int32), (first + counts).astype(np.int32), *tables]
        moved = self._staging.send([*wide, *narrow])
        input_ids, where, *slots = moved[: 2 + self._num_groups]
        logits_indices, fed_pairs, starts, seq_lens, *block_tables = moved[2 + self._num_groups :]
        if fed:
            assert chosen is not None
            input_ids[fed_pairs[0]] = chosen[fed_pairs[1]]
        return Batch(
            rows=rows,
            input_ids=input_ids,
            positions=where,
            query_start_loc=starts,
            seq_lens=seq_lens,
            slot_mapping=slots,
            block_tables=block_tables,
            logits_indices=logits_indices,
            row_starts=ends.tolist(),
            num_decode=num_decode + missing,
            fresh_from=_fresh_from(rows, num_decode) + missing,
            padded=padded_rows is not None,
        )

    def _slots(self, table: np.ndarray, row_of: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where each token is written; -1 for those before a sequence's first, which nobody wants."""
        block, offset = np.divmod(positions, self._block_size)
        slots = table[row_of, block].astype(np.int64) * self._block_size + offset
        return np.where(positions < 0, -1, slots)


def _fed(rows: Sequence[Scheduled], ends: np.ndarray, places: Mapping[Request, int]) -> list[tuple[int, int]]:
    """Where the tokens go that the host doesn't know, and where they come from."""
    lasts = zip(rows, ends[1:].tolist(), strict=True)
    return [(end - 1, places[row.request]) for row, end in lasts if not row.known]


def _token_ids(rows: Sequence[Scheduled], missing: int) -> np.ndarray:
    """The tokens of the rows; 0 where the host doesn't know one, and for each row that is missing."""
    ids: list[int] = []
    for row in rows:
        known = row.request.token_ids
        if row.count == 1:
            ids.append(known[row.start] if row.known else 0)
        else:
            ids += known[row.start : row.end]
            if not row.known:
                ids.append(0)
    return np.array(ids + [0] * missing, np.int64)


def table_width(num_tokens: int, block_size: int) -> int:
    """Columns of a table for so many tokens: a multiple of WIDTH_STEP."""
    return -(-num_tokens // (block_size * WIDTH_STEP)) * WIDTH_STEP


def _padded(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [rows, a multiple of 16 that holds the longest], padded with the null block."""
    padded = np.zeros((len(tables), table_width(max(map(len, tables), default=0), 1)), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def _fresh_from(rows: Sequence[Scheduled], num_decode: int) -> int:
    """The first of the last rows, those behind the decode rows that begin with this step."""
    fresh = len(rows)
    while fresh > num_decode and rows[fresh - 1].start == 0:
        fresh -= 1
    return fresh


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
