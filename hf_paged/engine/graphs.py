"""CUDA graphs of decode steps: captured once for a number of rows, replayed for any batch of as many or fewer.

A graph reads tokens, positions, lengths, slots and block tables from tensors that stay where they are; a step copies its
own into them. Rows that a batch lacks have length 0 and no slot. All graphs share one memory pool, since no two run at
once.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter

import torch

from hf_paged.config import PagedConfig
from hf_paged.engine.cache import PagedKVCache
from hf_paged.protocols import AttentionBackend, PagedModel
from hf_paged.types import Batch, Step

logger = logging.getLogger(__name__)

SMALL_SIZES = (1, 2, 4, 8, *range(16, 129, 16))
SIZE_STEP = 32  # beyond these
# A pool that is given back after each call takes its graphs along: those calls capture what they will use for long.
PATIENCE = 8


class DecodeGraphs:
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
        self._sizes = sizes_up_to(config.max_num_seqs)
        self._patience = 0 if config.keep_pool else PATIENCE
        self._wanted: Counter[int] = Counter()
        self._failed = False
        self.drop()

    def size_for(self, step: Step) -> int | None:
        """The rows of the graph that will serve a step of decode rows; None: it runs eagerly."""
        rows = len(step.rows)
        size = next((size for size in self._sizes if size >= rows), None)
        if size is None or self._failed:
            return None
        self._wanted[size] += 1
        return size if size in self._graphs or self._wanted[size] > self._patience else None

    def forward(self, batch: Batch, cache: PagedKVCache) -> torch.Tensor:
        """Logits [rows of the batch, vocabulary], until the next forward; see `Runner.forward`."""
        if self._cache_key != cache.key:
            self.drop()
            self._cache_key = cache.key
        size, rows = len(batch.seq_lens), len(batch.rows)
        if size not in self._graphs:
            try:
                self._capture(size, cache)
            except Exception as error:
                self.drop()
                self._failed = True
                logger.warning("decode steps run without CUDA graphs, for capturing one failed: %s", error)
                return self._model.forward(batch, self._backend.plan(batch, cache))[:rows]
        graph, logits = self._graphs[size]
        self._fill(batch)
        graph.replay()
        return logits[:rows]

    def capture_all(self, cache: PagedKVCache) -> None:
        """Capture the graphs of all sizes, the largest first: the others fit into its memory."""
        if self._cache_key != cache.key:
            self.drop()
            self._cache_key = cache.key
        for size in reversed(self._sizes):
            if size not in self._graphs and not self._failed:
                self._capture(size, cache)

    def drop(self) -> None:
        """Forget all graphs; those that are wanted are captured anew."""
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._inputs: Batch | None = None
        self._pool: object = None
        self._cache_key: object = None

    # ------------------------------------------------------------------------------------------------------------ parts

    def _capture(self, size: int, cache: PagedKVCache) -> None:
        if self._inputs is None:
            self._inputs = self._make_inputs()
            self._pool = torch.cuda.graph_pool_handle()
        batch = _first_rows(self._inputs, size)
        device = self._model.spec.device
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        collecting = gc.isenabled()
        gc.disable()  # what it frees, it might free in the middle of the capture
        try:
            with torch.cuda.stream(side):
                batch.seq_lens.zero_()
                for slots in batch.slot_mapping:
                    slots.fill_(-1)  # so that the forwards of the capture neither read nor write the cache
                self._model.forward(batch, self._backend.plan(batch, cache))  # compiles, and sets libraries up
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    logits = self._model.forward(batch, self._backend.plan(batch, cache))
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        current.wait_stream(side)
        self._graphs[size] = graph, logits

    def _make_inputs(self) -> Batch:
        """The tensors that graphs read."""
        spec, most = self._model.spec, self._sizes[-1]

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=spec.device)

        groups = range(len(spec.windows))
        return Batch(
            rows=(),
            input_ids=zeros(most),
            positions=zeros(most),
            query_start_loc=torch.arange(most + 1, dtype=torch.int32, device=spec.device),
            seq_lens=zeros(most, dtype=torch.int32),
            slot_mapping=[zeros(most) for _ in groups],
            block_tables=[zeros(most, self._width, dtype=torch.int32) for _ in groups],
            logits_indices=torch.arange(most, device=spec.device),
            row_starts=range(most + 1),
            num_decode=most,
            fresh_from=most,
        )

    def _fill(self, batch: Batch) -> None:
        assert self._inputs is not None
        size = len(batch.seq_lens)
        own = _first_rows(self._inputs, size)
        own.input_ids.copy_(batch.input_ids)
        own.positions.copy_(batch.positions)
        own.seq_lens.copy_(batch.seq_lens)
        for mine, given in zip(own.slot_mapping, batch.slot_mapping, strict=True):
            mine.copy_(given)
        for mine, given in zip(own.block_tables, batch.block_tables, strict=True):
            mine[:, : given.shape[1]].copy_(given)


def logits_rows(most: int) -> int:
    """Rows of logits that the graphs for up to `most` rows keep, all together."""
    return sum(sizes_up_to(most))


def sizes_up_to(most: int) -> list[int]:
    """The numbers of rows that have graphs, up to the first that serves `most` rows."""
    largest = SMALL_SIZES[-1]
    sizes = [*SMALL_SIZES, *range(largest + SIZE_STEP, most + SIZE_STEP, SIZE_STEP)]
    return sizes[: next(i for i, size in enumerate(sizes) if size >= most) + 1]


def _first_rows(batch: Batch, size: int) -> Batch:
    """A batch's first rows, each of one token; its tensors are views."""
    return Batch(
        rows=(),
        input_ids=batch.input_ids[:size],
        positions=batch.positions[:size],
        query_start_loc=batch.query_start_loc[: size + 1],
        seq_lens=batch.seq_lens[:size],
        slot_mapping=[slots[:size] for slots in batch.slot_mapping],
        block_tables=[table[:size] for table in batch.block_tables],
        logits_indices=batch.logits_indices[:size],
        row_starts=batch.row_starts[: size + 1],
        num_decode=size,
        fresh_from=size,
    )
