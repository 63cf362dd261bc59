"""CUDA graphs of steps: captured once for a layout, replayed for any batch that it can be padded to.

A graph reads tokens, positions, lengths, slots and block tables from tensors that stay where they are; a step copies
its own into them. All graphs write their logits to one tensor, and share one memory pool, since no two run at once.
"""

from __future__ import annotations

import bisect
import gc
import logging
import threading
from collections import Counter
from functools import cache
from typing import Any

import torch

from hf_paged.batch import Batch, Layout, Step
from hf_paged.config import PagedConfig
from hf_paged.engine.batch import leading_decode_rows
from hf_paged.engine.cache import PagedKVCache
from hf_paged.errors import is_out_of_memory
from hf_paged.forks import renewed_after_fork
from hf_paged.protocols import AttentionBackend, PagedModel

logger = logging.getLogger(__name__)
# Engines share the stream: a capture would record what another engine launches.
_capturing = renewed_after_fork(threading.Lock())

# Rows of steps that only decode. Beyond these, every 32nd.
DECODE_SIZES = (1, 2, 4, 8, *range(16, 129, 16))
DECODE_STEP = 32
# Of steps that prefill too: decode rows, tokens of the others, and the most of these. Larger steps keep the device busy
# for longer than the host takes to launch them one kernel after the other.
MIXED_DECODE = (0, 16, 64, 128, 256, 512)
MIXED_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
MIXED_PROMPTS = 16
# Beside more decode rows than MANY_ROWS prompts go a little in each step, unless BACKLOG tokens of them wait: on an
# H100 steps of 512 tokens, where products cease to wait for the weights, cost least for each token; and decode rows
# aren't held up by long steps.
MANY_ROWS = 128
BACKLOG = 4096
TILE = 256  # tokens; the products' tiles
# A pool that is given back after each call takes its graphs along: those calls capture what they will use for long.
PATIENCE = 8


class Graphs:
    """The graphs of one engine.

    Args:
        model, backend: what is captured.
        config: rows at most, and whether the KV pool outlives a call.
        width: most blocks of a block table.
    """

    def __init__(self, model: PagedModel, backend: AttentionBackend, config: PagedConfig, width: int) -> None:
        self._model = model
        self._backend = backend
        self._width = width
        self._decode = decode_sizes(config.max_num_seqs)
        self._mixed = [size for size in MIXED_DECODE if size < config.max_num_seqs] + [self._decode[-1]]
        self._patience = 0 if config.keep_pool else PATIENCE
        self._wanted: Counter[Layout] = Counter()
        self._failed = False
        self.drop()

    def layout(self, step: Step) -> Layout | None:
        """The layout of the graph that will serve a step; None: it runs eagerly."""
        layout = None if self._failed else self._smallest(step)
        if layout is None:
            return None
        self._wanted[layout] += 1
        return layout if layout in self._graphs or self._wanted[layout] > self._patience else None

    def prompt_tokens(self, decode: int, wanted: int) -> int:
        """How many of the `wanted` prompt tokens a step of so many decode rows shall take at most."""
        rows = _at_least(self._mixed, decode)
        if self._failed or self._patience or rows is None or decode <= MANY_ROWS or wanted >= BACKLOG:
            return wanted  # no graph will serve such a step, or it is better served at once
        return -(-(rows + TILE // 2) // TILE) * TILE - rows

    def forward(self, batch: Batch, layout: Layout, cache: PagedKVCache) -> torch.Tensor:
        """Logits [rows of the layout, vocabulary], until the next forward; see `Runner.forward`."""
        self._follow(cache)
        if layout not in self._graphs and not self._try_to_capture(layout, cache):
            return self._model.forward(batch, self._backend.plan(batch, cache))
        self._fill(batch, layout)
        self._graphs[layout].replay()
        assert self._logits is not None
        return self._logits[: layout.rows]

    def capture_all(self, cache: PagedKVCache) -> None:
        """Capture the graphs of all layouts, the largest first: the others fit into its memory."""
        self._follow(cache)
        mixed = [Layout(rows, rows + more, MIXED_PROMPTS) for rows in self._mixed for more in MIXED_TOKENS]
        for layout in [*reversed(mixed), *(Layout(size, size, 0) for size in reversed(self._decode))]:
            if layout not in self._graphs and not self._try_to_capture(layout, cache):
                if not self._failed:
                    self.capture_all(cache)  # of what is left
                return

    def drop(self) -> None:
        """Forget all graphs; those that are wanted are captured anew."""
        self._graphs: dict[Layout, torch.cuda.CUDAGraph] = {}
        self._inputs: Batch | None = None
        self._logits: torch.Tensor | None = None
        self._pool: Any = None
        self._cache_key: object = None

    # ------------------------------------------------------------------------------------------------------------ parts

    def _smallest(self, step: Step) -> Layout | None:
        """The smallest layout that a step can be padded to."""
        rows = leading_decode_rows(step.rows)
        if rows == len(step.rows):
            size = _at_least(self._decode, rows)
            return None if size is None else Layout(size, size, 0)
        decode, tokens = _at_least(self._mixed, rows), _at_least(MIXED_TOKENS, step.num_tokens - rows)
        if decode is None or tokens is None or len(step.rows) - rows > MIXED_PROMPTS:
            return None
        return Layout(decode, decode + tokens, MIXED_PROMPTS)

    def _follow(self, cache: PagedKVCache) -> None:
        if self._cache_key != cache.key:
            self.drop()
            self._cache_key = cache.key

    def _try_to_capture(self, layout: Layout, cache: PagedKVCache) -> bool:
        """Capture a graph. Where that fails, steps run eagerly from now on: out of memory, those that prefill first."""
        try:
            with _capturing:
                self._capture(layout, cache)
            return True
        except Exception as error:
            short, what, reason = is_out_of_memory(error), "steps", str(error)
        # The error is gone by now, and what the capture had allocated with it.
        self.drop()
        if short and self._mixed:
            self._mixed, what = [], "steps that prefill"
            torch.cuda.empty_cache()
        else:
            self._failed = True
        logger.warning("%s run without CUDA graphs, for capturing one failed: %s", what, reason)
        return False

    def _capture(self, layout: Layout, cache: PagedKVCache) -> None:
        if self._inputs is None:
            self._inputs = self._make_inputs()
            self._pool = torch.cuda.graph_pool_handle()
        batch = self._emptied(layout)
        current, side = torch.cuda.current_stream(self._device), _capture_stream(self._device)
        side.wait_stream(current)
        collecting = gc.isenabled()
        gc.disable()  # what it frees, it might free in the middle of the capture
        try:
            with torch.cuda.stream(side):
                # Compiles, and sets libraries up.
                logits = self._model.forward(batch, self._backend.plan(batch, cache))
                if self._logits is None:
                    shape = self._decode[-1] + MIXED_PROMPTS, logits.shape[1]
                    self._logits = torch.empty(shape, dtype=logits.dtype, device=logits.device)
                del logits
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._logits[: layout.rows] = self._model.forward(batch, self._backend.plan(batch, cache))
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        current.wait_stream(side)
        self._graphs[layout] = graph

    @property
    def _device(self) -> torch.device:
        return self._model.spec.device

    def _make_inputs(self) -> Batch:
        """The tensors that graphs read, for the largest layout."""
        rows, tokens = self._decode[-1] + MIXED_PROMPTS, self._decode[-1] + MIXED_TOKENS[-1]

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        groups = range(len(self._model.spec.windows))
        return Batch(
            rows=(),
            input_ids=zeros(tokens),
            positions=zeros(tokens),
            query_start_loc=zeros(rows + 1, dtype=torch.int32),
            seq_lens=zeros(rows, dtype=torch.int32),
            slot_mapping=[zeros(tokens) for _ in groups],
            block_tables=[zeros(rows, self._width, dtype=torch.int32) for _ in groups],
            logits_indices=zeros(rows),
            row_starts=(),
            num_decode=0,
            fresh_from=0,
        )

    def _views(self, layout: Layout) -> Batch:
        """The parts of the tensors that the graph of a layout reads."""
        whole, tokens, rows = self._inputs, layout.tokens, layout.rows
        assert whole is not None
        return Batch(
            rows=(),
            input_ids=whole.input_ids[:tokens],
            positions=whole.positions[:tokens],
            query_start_loc=whole.query_start_loc[: rows + 1],
            seq_lens=whole.seq_lens[:rows],
            slot_mapping=[slots[:tokens] for slots in whole.slot_mapping],
            block_tables=[table[:rows] for table in whole.block_tables],
            logits_indices=whole.logits_indices[:rows],
            row_starts=[*range(layout.decode + 1), *[tokens] * layout.prompts],
            num_decode=layout.decode,
            fresh_from=rows,
            layout=layout,
        )

    def _emptied(self, layout: Layout) -> Batch:
        """The views, with rows of no length and no slots: a forward over them neither reads nor writes the cache."""
        batch = self._views(layout)
        for tensor in (batch.input_ids, batch.positions, batch.seq_lens, batch.logits_indices):
            tensor.zero_()
        for slots in batch.slot_mapping:
            slots.fill_(-1)
        starts = torch.arange(layout.rows + 1, dtype=torch.int32, device=self._device)
        batch.query_start_loc.copy_(starts.clamp(max=layout.decode))
        return batch

    def _fill(self, batch: Batch, layout: Layout) -> None:
        own = self._views(layout)
        for name in ("input_ids", "positions", "query_start_loc", "seq_lens", "logits_indices"):
            getattr(own, name).copy_(getattr(batch, name))
        for mine, given in zip(own.slot_mapping, batch.slot_mapping, strict=True):
            mine.copy_(given)
        for mine, given in zip(own.block_tables, batch.block_tables, strict=True):
            mine[:, : given.shape[1]].copy_(given)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """What graphs are captured on. One for all engines: allocator and cuBLAS keep memory for each stream apart."""
    return torch.cuda.Stream(device)


def decode_sizes(most: int) -> list[int]:
    """The numbers of decode rows that have graphs, up to the first that serves `most` rows."""
    largest = DECODE_SIZES[-1]
    sizes = [*DECODE_SIZES, *range(largest + DECODE_STEP, most + DECODE_STEP, DECODE_STEP)]
    return sizes[: bisect.bisect_left(sizes, most) + 1]


def _at_least(sizes: list[int] | tuple[int, ...], least: int) -> int | None:
    place = bisect.bisect_left(sizes, least)
    return sizes[place] if place < len(sizes) else None
