"""What is told of an engine: of its cache, of each step, and what it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What a step observer sees, when the step's tokens are known. Host values only.

    Attributes:
        num_running, num_waiting: requests after the step was scheduled.
        num_prefill_tokens, num_decode_tokens: tokens of the step.
        num_preempted: requests preempted by the step.
        kv_usage: share of the pool's blocks that live requests hold, 0 to 1.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache and found, since the engine began.
        duration: seconds the step took: from its scheduling, or the end of the step before, to its last token.
    """

    num_running: int
    num_waiting: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preempted: int
    kv_usage: float
    prefix_queries: int
    prefix_hits: int
    duration: float


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """How the KV pool is used.

    Attributes:
        num_blocks: blocks of the pool, the null blocks left out, over all groups.
        num_free: of them, held by no request (some of these are kept for the prefix cache).
        pool_bytes: bytes of the pool.
        reserved_tokens: token slots handed to the requests that have finished.
        used_tokens: of them, written to.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found there.
        num_preemptions: how often a request lost its blocks.
    """

    num_blocks: int
    num_free: int
    pool_bytes: int
    reserved_tokens: int
    used_tokens: int
    prefix_queries: int
    prefix_hits: int
    num_preemptions: int

    @property
    def waste(self) -> float:
        """Share of the reserved token slots that nothing was ever written to."""
        return 1.0 - self.used_tokens / self.reserved_tokens if self.reserved_tokens else 0.0


@dataclasses.dataclass(frozen=True)
class EngineInfo:
    """What `engine_started` and `engine_stopped` tell."""

    model: str
    config: Any
    attention_backend: str
    scheduler: str
    plugins: Mapping[str, str]
