"""The KV tensors: one key pool and one value pool for each attention layer, laid out as the backend wants them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_paged.batch import CacheSpec
from hf_paged.protocols import AttentionBackend


class PagedKVCache:
    """The keys and values of all blocks.

    Args:
        spec: the model's layers.
        backend: decides the layout.
        num_blocks: for each cache group, the blocks of its pool, the null block counted.
        block_size: tokens of a block.

    Attributes:
        keys, values: for each layer a tensor in the backend's layout, in the model's dtype on its device.
        key: another object whenever the tensors are others.
    """

    def __init__(self, spec: CacheSpec, backend: AttentionBackend, num_blocks: Sequence[int], block_size: int) -> None:
        self.spec = spec
        self.block_size = block_size
        self.key = object()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._backend = backend
        self._groups = [spec.group_of(layer) for layer in range(len(spec.layers))]
        self._dims: list[tuple[int, int]] = []  # of keys and values, the dimension that counts blocks
        for layer, group in zip(spec.layers, self._groups, strict=True):
            key, key_dim = self._allocate(num_blocks[group], layer.num_kv_heads, layer.head_dim)
            value, value_dim = self._allocate(num_blocks[group], layer.num_kv_heads, layer.value_head_dim)
            self.keys.append(key)
            self.values.append(value)
            self._dims.append((key_dim, value_dim))

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def grow(self, num_blocks: Sequence[int]) -> None:
        """Have `num_blocks` blocks in each group from now on. Goes layer by layer, so that little is held twice."""
        self.key = object()
        for index, (layer, group) in enumerate(zip(self.spec.layers, self._groups, strict=True)):
            sizes = (layer.head_dim, layer.value_head_dim)
            for tensors, size, dim in zip((self.keys, self.values), sizes, self._dims[index], strict=True):
                old = tensors[index]
                if old.shape[dim] < num_blocks[group]:
                    tensors[index], _ = self._allocate(num_blocks[group], layer.num_kv_heads, size)
                    tensors[index].narrow(dim, 0, old.shape[dim]).copy_(old)

    def copy_blocks(self, copies: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Copy blocks, (from, to) for each group, as copy-on-write asks."""
        for group, pairs in enumerate(copies):
            if not pairs:
                continue
            source, target = torch.tensor(pairs, device=self.spec.device).unbind(1)
            for index in [i for i, g in enumerate(self._groups) if g == group]:
                for tensor, dim in zip((self.keys[index], self.values[index]), self._dims[index], strict=True):
                    tensor.index_copy_(dim, target, tensor.index_select(dim, source))

    def _allocate(self, num_blocks: int, num_heads: int, head_dim: int) -> tuple[torch.Tensor, int]:
        shape, dim = self._backend.kv_layout(num_blocks, self.block_size, num_heads, head_dim)
        with torch.inference_mode(False):  # made in one caller's inference mode, it must be writable in another's call
            tensor = torch.empty(shape, dtype=self.spec.dtype, device=self.spec.device)
        # The null block stands in tables where nothing is kept; whoever reads it must not meet a NaN.
        tensor.narrow(dim, 0, 1).zero_()
        return tensor, dim
