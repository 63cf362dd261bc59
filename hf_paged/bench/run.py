"""What one timed run of an engine gave, and the KV memory it took, counted the same way for every engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hf_paged.stats import CacheStats


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

    @classmethod
    def between(cls, before: CacheStats, after: CacheStats) -> KVUse:
        """What a paged engine's counters say about the time between two readings."""
        reserved = after.reserved_tokens - before.reserved_tokens
        return cls(reserved, after.used_tokens - before.used_tokens, after.pool_bytes)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run over a workload.

    Attributes:
        seconds: wall time, from the first request handed in to the last token back.
        outputs: the new tokens of each request, in the order of the requests; only useful ones.
        kv: the KV memory it took.
    """

    seconds: float
    outputs: list[list[int]]
    kv: KVUse

    @property
    def tokens(self) -> int:
        """Useful tokens generated."""
        return sum(len(output) for output in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens a second."""
        return self.tokens / self.seconds


def written(prompt: int, output: int) -> int:
    """Tokens of a request that have keys and values: all but the last, which nothing was computed from."""
    return prompt + output - 1


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a Transformers cache."""
    layers = getattr(cache, "layers", ())
    kept = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in kept if isinstance(tensor, torch.Tensor))
