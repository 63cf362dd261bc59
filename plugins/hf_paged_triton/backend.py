"""The backend: the layout of the pools, and one plan a step."""

from __future__ import annotations

from hf_paged.batch import Batch, CacheSpec
from hf_paged.protocols import KVCache, LayerPlan
from hf_paged_triton import compiling
from hf_paged_triton.kernels import InvariantKernels, TritonKernels, TritonSampling
from hf_paged_triton.plan import TritonPlan


class TritonBackend:
    """The attention backend "triton"; see the package.

    Args:
        spec, block_size: of the cache that it will serve; on a GPU its kernels are compiled from now on.
        deterministic: see `AttentionBackend`.
    """

    prefer_runs = False
    captures = True
    sampling = TritonSampling()

    def __init__(self, spec: CacheSpec | None = None, block_size: int = 16, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.kernels = InvariantKernels() if deterministic else TritonKernels()
        compiles = spec is not None and spec.device.type == "cuda"
        self._compiling = compiling.start(spec, block_size, deterministic) if spec and compiles else []

    def kv_layout(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int) -> tuple[tuple[int, ...], int]:
        """Blocks first, then tokens: a token's heads are contiguous, as the cache write and the copy engine need."""
        return (num_blocks, block_size, num_heads, head_dim), 0

    def plan(self, batch: Batch, cache: KVCache) -> LayerPlan:
        while self._compiling:
            self._compiling.pop().join()
        return TritonPlan(batch, cache, self.deterministic)
