"""How much KV memory a run took, counted the same way for every engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hf_paged.types import CacheStats


@dataclasses.dataclass(frozen=True)
class KVUse:
    """KV memory of a run.

    Attributes:
        reserved_tokens: token slots set aside for requests, summed over all of them.
        used_tokens: of them, those that hold the keys and values of a token of a request, up to its last useful one.
        peak_bytes: the most memory that the cache took at once.
    """

    reserved_tokens: int
    used_tokens: int
    peak_bytes: int

    @property
    def waste(self) -> float:
        """Share of the reserved slots that held nothing useful."""
        return 1.0 - self.used_tokens / self.reserved_tokens if self.reserved_tokens else 0.0


def written(prompt: int, output: int) -> int:
    """Tokens of a request that have keys and values: all but the last, which nothing was computed from."""
    return prompt + output - 1


def between(before: CacheStats, after: CacheStats) -> KVUse:
    """What a paged engine's counters say about the time between two readings."""
    return KVUse(
        after.reserved_tokens - before.reserved_tokens,
        after.used_tokens - before.used_tokens,
        after.pool_bytes,
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a Transformers cache."""
    layers = getattr(cache, "layers", ())
    kept = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in kept if isinstance(tensor, torch.Tensor))
