"""Step -> Batch: the tensors of one forward, in one copy to the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hf_paged.batch import Batch, Layout, Scheduled, Step
from hf_paged.engine.in_flight import InFlightStep
from hf_paged.engine.staging import Staging

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
        self._groups = range(num_groups)
        self._staging = Staging(device)

    def build(
        self,
        step: Step,
        *,
        layout: Layout | None = None,
        ahead: InFlightStep | None = None,
    ) -> Batch:
        """The tensors of a step; see `Batch` for their shapes.

        Args:
            layout: the size that the batch shall have; None: the step's own.
            ahead: the step before, with the sampled tokens that the host doesn't know yet.
        """
        padded = _Padded(step.rows, layout)
        positions = padded.positions
        tables = [
            _as_array([row.request.tables[group] if row else () for row in padded.rows]) for group in self._groups
        ]
        fed = []
        if ahead is not None and ahead.sampled is not None:
            index = ahead.sampled_index
            fed = [(end - 1, index[row.request]) for row, end in padded.ends_of_rows() if not row.known]
        wanted, sampling = _wanted_logits(padded)
        if layout is not None:  # indices must be unique: the fused last layer scatters to them
            taken = set(wanted)
            rest = (token for token in range(layout.tokens) if token not in taken)
            wanted += itertools.islice(rest, layout.rows - len(taken))
        wide = [
            padded.token_ids(),
            np.maximum(positions, 0),
            *(self._slots(table, padded.row_of, positions) for table in tables),
            np.array(wanted, np.int64),
            np.array(fed, np.int64).reshape(-1, 2).T,
        ]
        moved = self._staging.send([*wide, padded.starts.astype(np.int32), padded.lengths.astype(np.int32), *tables])
        input_ids, where, *slots = moved[: 2 + len(self._groups)]
        logits_indices, fed_pairs, starts, seq_lens, *block_tables = moved[2 + len(self._groups) :]
        if fed:
            assert ahead is not None
            assert ahead.sampled is not None
            input_ids[fed_pairs[0]] = ahead.sampled.on_device[fed_pairs[1]].clamp(
                min=0
            )  # NO_TOKEN ends its request when it lands
        return Batch(
            rows=step.rows,
            input_ids=input_ids,
            positions=where,
            query_start_loc=starts,
            seq_lens=seq_lens,
            slot_mapping=slots,
            block_tables=block_tables,
            logits_indices=logits_indices,
            row_starts=padded.starts.tolist(),
            num_decode=padded.decode,
            fresh_from=_fresh_from(padded),
            sampling=sampling,
            layout=layout,
        )

    def _slots(self, table: np.ndarray, row_of: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where each token is written; -1 for those before a sequence's first, which nobody wants."""
        block, offset = np.divmod(positions, self._block_size)
        slots = table[row_of, block].astype(np.int64) * self._block_size + offset
        return np.where(positions < 0, -1, slots)


def idle_batch(tokens: int, num_groups: int, block_size: int, device: torch.device) -> Batch:
    """One prompt of so many tokens that leaves nothing in the cache."""
    slots = torch.full((tokens,), -1, device=device)
    table = torch.zeros(1, table_width(tokens, block_size), dtype=torch.int32, device=device)
    return Batch(
        rows=(),
        input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.zeros(tokens, dtype=torch.int64, device=device),
        query_start_loc=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
        slot_mapping=[slots] * num_groups,
        block_tables=[table] * num_groups,
        logits_indices=torch.tensor([tokens - 1], device=device),
        row_starts=[0, tokens],
        num_decode=0,
        fresh_from=0,
    )


class _Padded:
    """A step's rows with those that its layout adds, which are None.

    Attributes:
        rows: decode rows first.
        decode: how many of them are decode rows.
        starts: int64 [rows + 1], where each row's tokens begin.
        lengths: int64 [rows], tokens of each row that have keys after the step.
        row_of: int64 [T], the row of each token; the last one's for tokens behind it.
        positions: int64 [T], in the token's own sequence; -1 for tokens that are added.
    """

    def __init__(self, rows: Sequence[Scheduled], layout: Layout | None) -> None:
        decode = leading_decode_rows(rows)
        layout = layout or Layout(decode, sum(row.count for row in rows), len(rows) - decode)
        self.decode = layout.decode
        self.rows: list[Scheduled | None] = [*rows[:decode], *[None] * (layout.decode - decode), *rows[decode:]]
        self.rows += [None] * (layout.rows - len(self.rows))
        counts = [row.count if row else int(at < layout.decode) for at, row in enumerate(self.rows)]
        first = np.array([row.start if row else -1 for row in self.rows], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.lengths = np.where(first < 0, 0, first + counts)
        behind = layout.tokens - int(self.starts[-1])
        row_of = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(row_of)) + (first - self.starts[:-1])[row_of]
        self.row_of = np.concatenate([row_of, np.full(behind, len(counts) - 1)])
        self.positions = np.concatenate([positions, np.full(behind, -1)])

    def token_ids(self) -> np.ndarray:
        """int64 [T]; 0 where the host doesn't know a token, and for those that are added."""
        ids: list[int] = []
        for at, row in enumerate(self.rows):
            if row is None:
                ids += [0] * (at < self.decode)
            elif row.count == 1:
                ids.append(row.request.token_ids[row.start] if row.known else 0)
            else:
                ids += row.request.token_ids[row.start : row.end]
                ids += [0] * (not row.known)
        return np.array(ids + [0] * (len(self.row_of) - len(ids)), np.int64)

    def ends_of_rows(self) -> Iterator[tuple[Scheduled, int]]:
        """The step's rows, each with one past its last token."""
        for row, end in zip(self.rows, self.starts[1:].tolist(), strict=True):
            if row is not None:
                yield row, end


def leading_decode_rows(rows: Sequence[Scheduled]) -> int:
    """How many rows of one token there are before any other."""
    return next((i for i, row in enumerate(rows) if row.count != 1), len(rows))


def _fresh_from(padded: _Padded) -> int:
    """The first of the last rows, those behind the decode rows that begin with this step."""
    fresh = len(padded.rows)
    while fresh > padded.decode and (row := padded.rows[fresh - 1]) is not None and row.start == 0:
        fresh -= 1
    return fresh


def _wanted_logits(padded: _Padded) -> tuple[list[int], list[tuple[Scheduled, int]]]:
    """The flat tokens whose logits are wanted, and the rows that sample, each with its place among these tokens.

    That is the last token of each row that samples, and every token of a row whose prompt's log-probabilities are
    wanted. Rows whose tokens are chosen at launch come first, so that a slice of the logits is theirs: to pick them by
    index, the host would have to wait for the device.
    """
    ends = list(padded.ends_of_rows())
    if not any(wants_prompt_logprobs(row) for row, _ in ends):  # else the step's order tells whose logits are whose
        ends.sort(key=lambda row_and_end: not row_and_end[0].request.runs_ahead)
    wanted: list[int] = []
    sampling = []
    for row, end in ends:
        if wants_prompt_logprobs(row):
            wanted.extend(range(end - row.count, end - row.samples))
        if row.samples:
            sampling.append((row, len(wanted)))
            wanted.append(end - 1)
    return wanted, sampling


def table_width(num_tokens: int, block_size: int) -> int:
    """Columns of a table for so many tokens: a multiple of WIDTH_STEP."""
    return -(-num_tokens // (block_size * WIDTH_STEP)) * WIDTH_STEP


def _as_array(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """int32 [rows, a multiple of 16 that holds the longest], padded with the null block."""
    padded = np.zeros((len(tables), table_width(max(map(len, tables), default=0), 1)), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def wants_prompt_logprobs(row: Scheduled) -> bool:
    """Whether a row asks for the log-probabilities of prompt tokens that it computes, for the first time."""
    request = row.request
    if request.prompt_logprobs is None:
        return False
    return len(request.prompt_logprobs) <= min(row.end, len(request.prompt_token_ids) - 1)
