"""PagedCache: a Transformers cache over blocks, for any forward or `generate()` that takes `past_key_values`.

A row is a table of blocks instead of a slice of a tensor. Beams, repeated and selected rows, and forks share blocks,
and copy the one that they write to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NoReturn, TypeAlias

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from hf_paged.batch import CacheSpec, LayerSpec
from hf_paged.config import PagedConfig
from hf_paged.engine.cache import PagedKVCache
from hf_paged.engine.rows import Pages, Rows
from hf_paged.hf.spec import unwrap

# The rows of each group of layers: those with the same window and device share their tables.
Groups: TypeAlias = dict[tuple[int | None, torch.device], Rows]


class PagedCache(DynamicCache):
    """Stock's dynamic cache, paged: the same answers, and rows that share what they have in common.

    Layers that keep keys and values, all of them or a window's, are paged. Others, such as recurrent states, are kept
    as stock keeps them. An encoder-decoder takes `EncoderDecoderCache(PagedCache(model), DynamicCache())`.

    Gradients don't flow through what was cached: a backward pass that would need them raises.

    Args:
        model_or_config: the model whose layers it serves, wrapped by PEFT or DDP or not, or its config.
        block_size: tokens of a block; a power of two.

    Raises:
        ConfigError: `block_size` is no power of two.
        UnsupportedModelError: `model_or_config` is neither a Transformers model nor a config.
    """

    def __init__(self, model_or_config: nn.Module | PreTrainedConfig, *, block_size: int = 16) -> None:
        PagedConfig(block_size=block_size)  # validates it
        is_config = isinstance(model_or_config, PreTrainedConfig)
        super().__init__(config=model_or_config if is_config else unwrap(model_or_config).config)
        self.block_size = block_size
        self._groups: Groups = {}
        self.layers: list[Any] = [self._paged(layer) for layer in self.layers]

    def _paged(self, layer: Any) -> Any:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return layer
        return PagedLayer(self._groups, self.block_size, getattr(layer, "sliding_window", None))

    # ------------------------------------------------------------------------------------------------------- statistics

    @property
    def num_blocks(self) -> int:
        """Blocks that there is memory for, the null blocks left out, over all groups of layers."""
        return sum(rows.pages.pool.num_blocks - 1 for rows in self._groups.values())

    @property
    def num_used_blocks(self) -> int:
        """Of them, held by this cache and its forks together. A block counts once, however many rows hold it."""
        return self.num_blocks - sum(rows.pages.num_free for rows in self._groups.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the paged layers' memory, which the forks share."""
        return sum(memory.nbytes for rows in self._groups.values() for memory in rows.pages.layers)

    # ------------------------------------------------------------------------------------------------------------- rows

    def fork(self) -> PagedCache:
        """A second cache with the same content. The two share each block until one of them writes to it."""
        twin = copy.copy(self)
        twin._groups = {key: rows.fork() for key, rows in self._groups.items()}
        twin.layers = [
            layer.fork(twin._groups) if isinstance(layer, PagedLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """Transformers' recipe for using a prefix again is to copy its cache; this copy shares its blocks."""
        return self.fork()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Have row `beam_idx[i]` at `i`."""
        self._select(beam_idx)
        for layer in self._stock_layers():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, or where it is true."""
        self._select(indices)
        for layer in self._stock_layers():
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row `repeats` times, one after the other."""
        for rows in self._groups.values():
            rows.select([row for row in range(len(rows.tables)) for _ in range(repeats)])
        for layer in self._stock_layers():
            layer.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: `tokens_to_remove` is positive.
            RuntimeError: a window has moved on, and its layer doesn't record the past; nothing was cropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop() takes the number of tokens to remove as a negative one, got {tokens_to_remove}")
        paged = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        for layer in paged:
            layer.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)
        for rows in self._groups.values():
            rows.truncate(max(layer.get_seq_length() for layer in paged if layer.rows is rows))

    def reset(self) -> None:
        """Forget everything. The memory is given back, where no fork needs it."""
        super().reset()
        self._groups.clear()

    def _select(self, indices: torch.Tensor) -> None:
        for rows in self._groups.values():
            rows.select(torch.arange(len(rows.tables))[indices.cpu()].tolist())

    def _stock_layers(self) -> Iterator[Any]:
        return (layer for layer in self.layers if not isinstance(layer, PagedLayer))


class PagedLayer(CacheLayerMixin):
    """One layer's keys and values. It shows what stock's dynamic layer shows, with a window or without.

    Its rows belong to the cache, which reorders, forks and frees them for all layers at once.
    """

    is_croppable = True

    def __init__(self, groups: Groups, block_size: int, window: int | None) -> None:
        # Not the base's: it sets `keys`, `values` and `is_initialized`, which are computed here.
        self.sliding_window = window
        self.is_sliding = window is not None
        self.record_past = False
        self.rows: Rows | None = None
        self._memory: PagedKVCache | None = None
        self._groups = groups
        self._block_size = block_size
        self._length = 0

    @property
    def is_initialized(self) -> bool:
        """Whether it has memory."""
        return self.rows is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys that the next token sees, [rows, heads, tokens, head_dim]."""
        return None if self._memory is None else self._read(self._memory.keys[0], self._first_visible(self._length))

    @property
    def values(self) -> torch.Tensor | None:
        """The values that the next token sees, [rows, heads, tokens, value_head_dim]."""
        return None if self._memory is None else self._read(self._memory.values[0], self._first_visible(self._length))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take number of rows, sizes, dtype and device from the first update."""
        num_rows, num_heads, _, head_dim = key_states.shape
        spec = LayerSpec(num_heads, num_heads, head_dim, value_states.shape[3], self.sliding_window)
        key = (self.sliding_window, key_states.device)
        if key not in self._groups:
            self._groups[key] = Rows(Pages(self._block_size), [[] for _ in range(num_rows)])
        self.rows = self._groups[key]
        self._memory = self.rows.pages.add_layer(CacheSpec((spec,), key_states.dtype, key_states.device))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values, [rows, heads, tokens, size], and return them with those before them that they see.

        What a single row gets may be a view of the cache, which is valid until the cache is changed.

        Raises:
            ValueError: rows, heads, sizes, dtype or device are not those of the first update.
        """
        if self.rows is None:
            self.lazy_initialization(key_states, value_states)
        assert self.rows is not None
        assert self._memory is not None
        _check_states(self._memory.spec, len(self.rows.tables), key_states, value_states)
        start, end = self._length, self._length + key_states.shape[2]
        visible = self._first_visible(start)
        # Of a prompt, only what the token after it sees is written.
        first = self._first_visible(end) if start == 0 and not self.record_past else start
        with self.rows.pages.lock:
            if not self.record_past:
                self.rows.slide(visible if start else first)
            self.rows.own(first, end)
            self._length = end
            for pool, states in ((self._memory.keys[0], key_states), (self._memory.values[0], value_states)):
                self.rows.write(pool, states.detach()[:, :, first - start :], end)
            if start == 0:
                return key_states, value_states
            keys, values = self._read(self._memory.keys[0], visible), self._read(self._memory.values[0], visible)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return _WithoutHistory.apply(keys, key_states), _WithoutHistory.apply(values, value_states)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of a row so far, those that a window has left behind included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys an update with `query_length` tokens returns, and the position of the first."""
        first = self._first_visible(self._length)
        return self._length - first + query_length, first

    def get_max_length(self) -> int:
        """The window, or -1 where there is no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until the next `crop`, which can then bring it back."""
        self.record_past = True

    def check_crop(self, count: int) -> None:
        """Raise RuntimeError where a window without the last `count` tokens would show some that are gone."""
        if self.rows is not None and count and self._first_visible(self._length - count) < self.rows.held_from:
            raise RuntimeError(
                f"can't crop {count} tokens: a window of {self.sliding_window} has moved on, and what it left is gone; "
                "call activate_past_recording() on the cache before a forward that may be taken back"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """See `PagedCache.crop`, which then frees the blocks."""
        self._length = max(0, self._length + tokens_to_remove)
        if self.rows is not None:
            self.rows.slide(self._first_visible(self._length))

    def reset(self) -> None:
        self._length, self.rows, self._memory = 0, None, None

    def fork(self, groups: Groups) -> PagedLayer:
        """The layer over the tables of another cache."""
        twin = copy.copy(self)
        twin._groups = groups
        twin.rows = next((groups[key] for key, rows in self._groups.items() if rows is self.rows), None)
        return twin

    def _first_visible(self, position: int) -> int:
        """The first token that the one at `position` sees."""
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1)

    def _read(self, pool: torch.Tensor, first: int) -> torch.Tensor:
        assert self.rows is not None
        with self.rows.pages.lock:
            return self.rows.read(pool, first, self._length)


class _WithoutHistory(torch.autograd.Function):
    """Hands on what was cached. A backward pass would silently miss all that came before it, so it raises."""

    @staticmethod
    def forward(ctx: Any, cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return cached.view_as(cached)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise RuntimeError("PagedCache keeps no gradients: use torch.no_grad(), or train with a DynamicCache")


def _check_states(spec: CacheSpec, num_rows: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse what doesn't fit to the first update.

    Raises:
        ValueError: with what came and what is kept.
    """
    (layer,) = spec.layers
    names = ("rows", "heads", "head_dim", "value_head_dim", "dtype", "device")
    kept = (num_rows, layer.num_kv_heads, layer.head_dim, layer.value_head_dim, spec.dtype, spec.device)
    found = (*key.shape[:2], key.shape[3], value.shape[3], key.dtype, key.device)
    wrong = [f"{name} {new} instead of {old}" for name, old, new in zip(names, kept, found, strict=True) if old != new]
    if wrong:
        raise ValueError(f"the cache began otherwise: {', '.join(wrong)}; reset() it, select rows, or take a new one")
