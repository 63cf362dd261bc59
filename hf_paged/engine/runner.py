"""The runner: one forward of the model over a batch, eagerly or by replaying a captured CUDA graph."""

from __future__ import annotations

import torch

from hf_paged.batch import Batch, Layout, Step
from hf_paged.config import PagedConfig
from hf_paged.engine.batch import idle_batch, wants_prompt_logprobs
from hf_paged.engine.cache import PagedKVCache
from hf_paged.engine.graphs import Graphs
from hf_paged.protocols import AttentionBackend, PagedModel

WIDEST_TABLE = 65_536  # blocks; graphs keep a table of this width for each row


class Runner:
    """Runs batches.

    Args:
        model: maps batches to logits.
        backend: attention over the cache.
        config: whether graphs are captured, and for how many rows at most.
        width: most blocks of a block table.
    """

    def __init__(self, model: PagedModel, backend: AttentionBackend, config: PagedConfig, width: int) -> None:
        self._model = model
        self._backend = backend
        self._captures = model.spec.device.type == "cuda" and getattr(backend, "captures", False)
        graphs = self._captures and width <= WIDEST_TABLE and not config.enforce_eager
        self._graphs = Graphs(model, backend, config, width) if graphs else None

    def layout(self, step: Step) -> Layout | None:
        """The size that the batch of a step shall have, for a graph to serve it; None: the step's own."""
        if self._graphs is None or any(wants_prompt_logprobs(row) for row in step.rows):
            return None
        if torch.is_autocast_enabled(self._model.spec.device.type):
            return None  # a graph would read the casts of the weights that autocast keeps no longer than its context
        return self._graphs.layout(step)

    def prompt_tokens(self, decode: int, wanted: int) -> int:
        """How many of the `wanted` prompt tokens a step of so many decode rows shall take at most."""
        if self._graphs is None or torch.is_autocast_enabled(self._model.spec.device.type):
            return wanted
        return self._graphs.prompt_tokens(decode, wanted)

    def forward(self, step: Step, batch: Batch, cache: PagedKVCache) -> torch.Tensor:
        """Logits [S, vocabulary] of the tokens `batch.logits_indices`; keys and values are in the cache after it.

        They may be overwritten by the next forward.
        """
        cache.copy_blocks(step.copies)
        if batch.layout is not None:
            assert self._graphs is not None
            return self._graphs.forward(batch, batch.layout, cache)
        return self._model.forward(batch, self._backend.plan(batch, cache))

    def warm_up(self, cache: PagedKVCache, tokens: int) -> None:
        """Capture every graph now, instead of when it is first of use, and launch a step of `tokens` tokens."""
        if self._graphs is not None:
            self._graphs.capture_all(cache)
        if self._captures:  # what a first step of this size allocates and loads, it finds
            spec = self._model.spec
            batch = idle_batch(tokens, len(spec.windows), cache.block_size, spec.device)
            self._model.forward(batch, self._backend.plan(batch, cache))

    def forget_graphs(self) -> None:
        """Drop what was captured: the forward is another one by now, or the cache's memory is given back."""
        if self._graphs is not None:
            self._graphs.drop()
