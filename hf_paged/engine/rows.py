"""Rows of one length over blocks: the memory behind `hf.paged_cache.PagedCache`.

The engine's requests come and go, each with a length of its own, and have `BlockTables`. The rows of a batch that its
caller steps grow together, and are reordered, repeated, cut and forked. Both stand on `BlockPool`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import cast

import torch

from hf_paged.batch import NULL_BLOCK, CacheSpec
from hf_paged.engine.blocks import BlockPool
from hf_paged.engine.cache import PagedKVCache
from hf_paged.protocols import AttentionBackend

GROWTH = 1.5  # growing copies


class Pages:
    """The memory of layers with the same tables: a block pool, and keys and values for each layer. Forks share it.

    Attributes:
        lock: held while tables or tensors are changed or read; forks may be used in different threads.
        layers: keys and values of each layer, in the order in which they were added.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.lock = threading.RLock()
        self.pool = BlockPool(2)
        self.layers: list[PagedKVCache] = []
        # Tables of rows that are gone. The garbage collector may find them in the midst of anything, so they wait here.
        self.dropped: deque[list[list[int]]] = deque()

    @property
    def num_free(self) -> int:
        """Blocks that no row holds."""
        with self.lock:
            self._collect()
            return self.pool.num_free

    def add_layer(self, spec: CacheSpec) -> PagedKVCache:
        """Memory for one more layer, the only one of `spec`."""
        with self.lock:
            memory = PagedKVCache(spec, cast(AttentionBackend, self), [self.pool.num_blocks], self.block_size)
            self.layers.append(memory)
        return memory

    def kv_layout(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], int]:
        """See `AttentionBackend.kv_layout`. Here the tokens of blocks that lie in a row are one view."""
        return (num_heads, num_blocks, block_size, head_dim), 1

    def provide(self, count: int) -> None:
        """Have at least `count` free blocks."""
        self._collect()
        missing = count - self.pool.num_free
        if missing > 0:
            size = max(self.pool.num_blocks + missing, int(GROWTH * self.pool.num_blocks))
            for layer in self.layers:
                layer.grow([size])
            self.pool.grow(size)  # last: a block must never be handed out that has no memory

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks in every layer, (from, to)."""
        for layer in self.layers:
            layer.copy_blocks([pairs])

    def _collect(self) -> None:
        while self.dropped:
            for table in self.dropped.popleft():
                self.pool.give(table)


class Rows:
    """The block tables of one batch: rows with the same number of tokens, which may share blocks.

    Attributes:
        tables: for each row its block ids in order; the null block where nothing is kept any more.
        held_from: the first token that is kept.
    """

    def __init__(self, pages: Pages, tables: list[list[int]], held_from: int = 0) -> None:
        self.pages = pages
        self.tables = tables
        self.held_from = held_from
        self._owned: tuple[int, int] | None = None
        self._places: dict[tuple[int, ...], slice | torch.Tensor] = {}

    def __del__(self) -> None:
        self.pages.dropped.append(self.tables)

    # -------------------------------------------------------------------------------------------------- rows as a whole

    def fork(self) -> Rows:
        """Rows with the same content, which share every block."""
        with self.pages.lock:
            self._changed()
            self._share(self.tables)
            return Rows(self.pages, [list(table) for table in self.tables], self.held_from)

    def select(self, indices: Sequence[int]) -> None:
        """Have row `indices[i]` at `i`."""
        if list(indices) == list(range(len(self.tables))):
            return
        with self.pages.lock:
            self._changed()
            chosen = [list(self.tables[index]) for index in indices]
            self._share(chosen)
            for table in self.tables:
                self.pages.pool.give(table)
            self.tables[:] = chosen

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens."""
        with self.pages.lock:
            self._changed()
            blocks = -(-num_tokens // self.pages.block_size)
            for table in self.tables:
                self.pages.pool.give(reversed(table[blocks:]))
                del table[blocks:]

    def slide(self, first: int) -> None:
        """Give up the tokens before `first`."""
        if first <= self.held_from:
            return
        with self.pages.lock:
            self._changed()
            old, new = (min(token // self.pages.block_size, len(self.tables[0])) for token in (self.held_from, first))
            for table in self.tables:
                self.pages.pool.give(table[old:new])
                table[old:new] = [NULL_BLOCK] * (new - old)
            self.held_from = first

    def own(self, first: int, end: int) -> None:
        """Have blocks that nobody else holds for the tokens `first` to `end`, which are about to be written."""
        if self._owned == (first, end):
            return  # the layer before has asked already
        self._check_held(first)
        self._changed()
        pool, size = self.pages.pool, self.pages.block_size
        begin, stop = first // size, -(-end // size)
        held = len(self.tables[0])
        written = [(table, i) for i in range(begin, min(stop, held)) for table in self.tables]
        shared = sum(pool.refs[table[i]] > 1 for table, i in written)
        self.pages.provide(shared + len(self.tables) * max(0, stop - max(begin, held)))
        copies = []
        for table, i in written:
            if pool.refs[table[i]] > 1:  # the last one to ask keeps it
                copies.append((table[i], pool.take(after=table[i - 1] if i else NULL_BLOCK)))
                pool.give([table[i]])
                table[i] = copies[-1][1]
        self.pages.copy_blocks(copies)
        for table in self.tables:
            table += [NULL_BLOCK] * (begin - held)
            for _ in range(len(table), stop):
                table.append(pool.take(after=table[-1] if table else NULL_BLOCK))  # in a row where possible
        self._owned = first, end

    def _check_held(self, first: int) -> None:
        if first < self.held_from:
            raise RuntimeError(
                f"tokens before {self.held_from} are gone; layers of one window have to advance together"
            )

    def _share(self, tables: Sequence[Sequence[int]]) -> None:
        for table in tables:
            for block in table:
                if block != NULL_BLOCK:
                    self.pages.pool.share(block)

    def _changed(self) -> None:
        self._owned = None
        self._places.clear()

    # ----------------------------------------------------------------------------------------------------- keys, values

    def write(self, pool: torch.Tensor, states: torch.Tensor, end: int) -> None:
        """Write the tokens up to `end`.

        Args:
            pool: one layer's keys or values, [heads, blocks, tokens of a block, size].
            states: [rows, heads, tokens, size].
        """
        places = self._find(end - states.shape[2], end, pool)
        if isinstance(places, slice):
            pool.flatten(1, 2)[:, places] = states[0]
        else:
            pool.flatten(0, 2).index_copy_(0, places, states.flatten(0, 2))

    def read(self, pool: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """The tokens `first` to `end`, [rows, heads, tokens, size].

        They are a view where there is one row and its blocks lie in a row. Else they are copied, and contiguous as in
        stock's cache: some models ask for a view of them.
        """
        self._check_held(first)
        places = self._find(first, end, pool)
        if isinstance(places, slice):
            return pool.flatten(1, 2)[:, places].unsqueeze(0)
        return pool.flatten(0, 2).index_select(0, places).view(len(self.tables), len(pool), end - first, pool.shape[3])

    def _find(self, first: int, end: int, pool: torch.Tensor) -> slice | torch.Tensor:
        """Where tokens lie: a slice of the slots, or an index into [heads × slots]. Found once for all layers."""
        key = first, end, *pool.shape[:2]
        if key not in self._places:
            slots = self._slots(first, end)
            if isinstance(slots, torch.Tensor):
                heads = torch.arange(len(pool)) * (pool.shape[1] * self.pages.block_size)
                slots = (heads[:, None] + slots[:, None]).flatten().to(pool.device)
            self._places[key] = slots
        return self._places[key]

    def _slots(self, first: int, end: int) -> slice | torch.Tensor:
        """The slots of tokens: one slice where that is possible, else int64 [rows, tokens]."""
        size = self.pages.block_size
        begin, stop = first // size, -(-end // size)
        blocks = [table[begin:stop] for table in self.tables]
        if len(blocks) == 1 and blocks[0] == list(range(blocks[0][0], blocks[0][0] + stop - begin)):
            offset = (blocks[0][0] - begin) * size
            return slice(first + offset, end + offset)
        slots = torch.tensor(blocks)[:, :, None] * size + torch.arange(size)
        return slots.flatten(1)[:, first - begin * size : end - begin * size]
