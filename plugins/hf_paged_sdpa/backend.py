"""Plan once a step: where each row's keys lie. Run once a layer: write, attend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from hf_paged.batch import Batch, Scheduled
from hf_paged.protocols import KVCache, LayerPlan
from hf_paged_sdpa.attend import attend, flash, flash_serves, merge, with_sinks
from hf_paged_sdpa.kernels import TiledKernels, TorchKernels, rotate

# Runs beyond this many are gathered first: a call costs more than copying a few blocks.
MOST_RUNS = 4


class SDPABackend:
    """The attention backend in torch.

    Args:
        deterministic: see `AttentionBackend`; keys are copied then, and queries attend one by one.
    """

    prefer_runs = True
    captures = False
    sampling = None

    def __init__(self, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.kernels = TiledKernels() if deterministic else TorchKernels()

    def kv_layout(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], int]:
        """Heads first: tokens of neighbouring blocks follow each other, and each head reads a contiguous stretch."""
        return (num_heads, num_blocks, block_size, head_dim), 1

    def plan(self, batch: Batch, cache: KVCache) -> LayerPlan:
        return OneByOne(batch, cache) if self.deterministic else SDPAPlan(batch, cache)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row of the batch reads.

    Attributes:
        first, last: its tokens in the flat batch.
        runs: slots, in order, of the keys that it reads from the cache.
        mask: bool [tokens, keys in `runs` (and the row's own, if `fresh`)], or None: all of them, its own causally.
        fresh: whether its own keys are read from the step's key tensor instead of the cache.
    """

    first: int
    last: int
    runs: tuple[range, ...]
    mask: torch.Tensor | None
    fresh: bool


class SDPAPlan:
    """One step over the cache."""

    exact = False

    def __init__(self, batch: Batch, cache: KVCache) -> None:
        spec = cache.spec
        self._cache = cache
        self._slots = batch.slot_mapping
        self._groups = [spec.group_of(layer) for layer in range(len(spec.layers))]
        self._rows = [
            _rows(batch, group, window, cache.block_size, spec.device) for group, window in enumerate(spec.windows)
        ]

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer].flatten(1, 2), self._cache.values[layer].flatten(1, 2)
        # Under autocast a layer may give queries and keys of another dtype than values; the cache has one.
        query, key, value = (_dense(x.to(keys.dtype)) for x in (query, key, value))
        group = self._groups[layer]
        keys.index_copy_(1, self._slots[group], key.transpose(0, 1))
        values.index_copy_(1, self._slots[group], value.transpose(0, 1))
        return self._attend(group, query, key, value, keys, values, scale, softcap, sinks)

    def _attend(
        self,
        group: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the step's queries over its own keys and those in the cache, of which its own are part."""
        rows = self._rows[group]
        pieces: list[torch.Tensor] = []
        if flash_serves(query, value, softcap) and sinks is None:
            pieces = _decode(rows, query, keys, values, scale)
        num_kv_heads, head_dim = key.shape[1:]
        grouped = query.view(len(query), num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        for row in rows[len(pieces) :]:
            own = slice(row.first, row.last)
            stretches = [(keys[:, run.start : run.stop], values[:, run.start : run.stop]) for run in row.runs]
            if len(stretches) > MOST_RUNS or (row.mask is not None and stretches):
                stretches = [(torch.cat(k, 1), torch.cat(v, 1)) for k, v in [tuple(zip(*stretches, strict=True))]]
            new_keys, new_values = key[own].transpose(0, 1), value[own].transpose(0, 1)
            output, lse = _attend_row(row, grouped[:, :, own], new_keys, new_values, stretches, scale, softcap)
            if sinks is not None:
                output = with_sinks(output, lse, sinks)
            pieces.append(output.permute(2, 0, 1, 3).reshape(row.last - row.first, -1, output.shape[-1]))
        return torch.cat(pieces)

    def run_rotary(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query, key = (rotate(x, cos, sin, interleaved=interleaved, exact=self.exact) for x in (query, key))
        return self.run(layer, query, key, value, scale=scale, softcap=softcap, sinks=sinks)


class OneByOne(SDPAPlan):
    """Deterministic mode: one query at a time over copied keys, so results don't depend on batching or chunking."""

    exact = True

    def __init__(self, batch: Batch, cache: KVCache) -> None:
        super().__init__(batch, cache)
        self._shares = batch.rows
        self._windows = cache.spec.windows
        self._block_size = cache.block_size

    def _attend(
        self,
        group: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        window = self._windows[group]
        queries = iter(query.view(len(query), key.shape[1], -1, 1, query.shape[-1]).unbind(0))
        pieces = []
        for share in self._shares:
            first = 0 if window is None else max(0, share.start - window + 1)
            runs = _runs(share.request.tables[group], first, share.end, self._block_size)
            seen, held = (torch.cat([x[:, run.start : run.stop] for run in runs], 1) for x in (keys, values))
            for position in range(share.start, share.end):
                low = 0 if window is None else max(0, position - window + 1) - first
                own = slice(low, position + 1 - first)
                # From the first key on they lie as they are; others are copied to where every tensor begins.
                k, v = (x[:, own].clone() if low else x[:, own] for x in (seen, held))
                output, lse = attend(next(queries), k, v, scale, softcap=softcap)
                if sinks is not None:
                    output = with_sinks(output, lse, sinks)
                pieces.append(output.reshape(1, -1, output.shape[-1]))
        return torch.cat(pieces)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with heads that lie in one piece: torch's fused CPU attention takes them for that without a check."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _decode(
    rows: Sequence[Row], query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> list[torch.Tensor]:
    """The leading rows that are one query over one run: most rows of most steps, so nothing is done twice for them.

    The query heads of a key head are taken for queries of one head: they see the same keys.
    """
    num_kv_heads, _, head_dim = keys.shape
    queries = query.view(len(query), num_kv_heads, 1, -1, head_dim).unbind(0)
    keys, values = keys.unsqueeze(1), values.unsqueeze(1)
    pieces = []
    for row, one in zip(rows, queries, strict=False):
        if row.fresh or len(row.runs) != 1:
            break
        run = row.runs[0]
        start, length = run.start, run.stop - run.start
        output, _ = flash(one, keys.narrow(2, start, length), values.narrow(2, start, length), scale)
        pieces.append(output.reshape(1, -1, head_dim))
    return pieces


def _attend_row(
    row: Row,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    stretches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if row.mask is not None:
        past = row.mask.shape[1] - key.shape[1]
        if past:
            key, value = torch.cat([stretches[0][0], key], 1), torch.cat([stretches[0][1], value], 1)
        return attend(query, key, value, scale, mask=row.mask, softcap=softcap)
    parts = [attend(query, k, v, scale, softcap=softcap) for k, v in stretches]
    if row.fresh:
        parts.append(attend(query, key, value, scale, causal=True, softcap=softcap))
    return merge(parts)


def _rows(batch: Batch, group: int, window: int | None, block_size: int, device: torch.device) -> list[Row]:
    rows, first = [], 0
    for share in batch.rows:
        rows.append(_row(share, first, share.request.tables[group], window, block_size, device))
        first += share.count
    return rows


def _row(
    share: Scheduled, first: int, table: Sequence[int], window: int | None, block_size: int, device: torch.device
) -> Row:
    fresh = share.count > 1
    past_end = share.start if fresh else share.end
    seen_from = 0 if window is None else max(0, share.start - window + 1)
    cut = window is not None and fresh and share.end > window
    return Row(
        first=first,
        last=first + share.count,
        runs=tuple(_runs(table, seen_from, past_end, block_size)),
        mask=_band(share, seen_from, window, device) if cut else None,
        fresh=fresh,
    )


def _runs(table: Sequence[int], start: int, end: int, block_size: int) -> list[range]:
    """The slots of positions `start` to `end`, neighbouring blocks joined."""
    runs: list[range] = []
    for index in range(start // block_size, -(-end // block_size)):
        base = (table[index] - index) * block_size
        slots = range(base + max(start, index * block_size), base + min(end, (index + 1) * block_size))
        if runs and runs[-1].stop == slots.start:
            runs[-1] = range(runs[-1].start, slots.stop)
        else:
            runs.append(slots)
    return runs


def _band(share: Scheduled, seen_from: int, window: int | None, device: torch.device) -> torch.Tensor:
    """What each token of a chunk sees under a window: bool [tokens, positions `seen_from` to the chunk's end]."""
    assert window is not None
    queries = torch.arange(share.start, share.end, device=device)[:, None]
    keys = torch.arange(seen_from, share.end, device=device)[None]
    return (keys <= queries) & (queries - keys < window)
