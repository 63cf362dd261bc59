"""The runner: one forward of the model over a batch."""

from __future__ import annotations

import torch

from hf_paged.engine.cache import PagedKVCache
from hf_paged.protocols import AttentionBackend, PagedModel
from hf_paged.types import Batch, Step


class Runner:
    """Runs batches eagerly. CUDA-graph capture and replay will live here."""

    def __init__(self, model: PagedModel, backend: AttentionBackend) -> None:
        self._model = model
        self._backend = backend

    def forward(self, step: Step, batch: Batch, cache: PagedKVCache) -> torch.Tensor:
        """Logits [S, vocabulary] of the tokens `batch.logits_indices`; keys and values are in the cache after it."""
        # Not inference mode: what the model keeps of its own (rotary tables that grow) must stay usable in training.
        with torch.no_grad():
            cache.copy_blocks(step.copies)
            return self._model.forward(batch, self._backend.plan(batch, cache))
