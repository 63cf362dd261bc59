"""The backend: the layout of the pools, and a plan a step."""

from __future__ import annotations

from hf_paged.protocols import KVCache, LayerPlan
from hf_paged.types import Batch
from hf_paged_triton.kernels import TritonKernels, TritonSampling
from hf_paged_triton.plan import TritonPlan


class TritonBackend:
    """See the package."""

    prefer_runs = False
    captures = True
    kernels = TritonKernels()
    sampling = TritonSampling()

    def kv_layout(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], int]:
        """Blocks first, then tokens: a token's heads lie side by side, as the cache write and the copy engine want."""
        return (num_blocks, block_size, num_heads, head_dim), 0

    def plan(self, batch: Batch, cache: KVCache) -> LayerPlan:
        """See `AttentionBackend.plan`."""
        return TritonPlan(batch, cache)
