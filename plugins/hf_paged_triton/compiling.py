"""Compiling the attention kernels in parallel, in background threads, while the engine is built.

Triton compiles a kernel at its first launch, one at a time, for seconds each. Here each kind of launch that a first
answer needs is made once, over zeros, in its own thread. Options that a layer's spec does not name (a soft-cap, sinks,
a partial rotation) need other kernels, which are compiled at their first launch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

import hf_paged_kernels as kernels
from hf_paged.batch import CacheSpec, LayerSpec

logger = logging.getLogger(__name__)

TOKENS = 32


def start(spec: CacheSpec, block_size: int, deterministic: bool) -> list[threading.Thread]:
    """Start to compile; join the threads before the first real launch."""
    kinds = (_invariant, _write) if deterministic else (_decode, _paged, _write)
    jobs = [(kind, layer) for layer in dict.fromkeys(spec.layers) for kind in kinds]
    threads = [threading.Thread(target=_run, args=(*job, spec, block_size), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    return threads


def _run(kind: Callable[[LayerSpec, _Zeros], object], layer: LayerSpec, spec: CacheSpec, block_size: int) -> None:
    try:
        with torch.no_grad(), torch.cuda.device(spec.device):
            kind(layer, _Zeros(layer, spec, block_size))
    except Exception:  # the step that needs this kernel raises the error to its caller
        logger.debug("a kernel could not be compiled in advance", exc_info=True)


class _Zeros:
    """Arguments for one row of TOKENS tokens, all zeros."""

    def __init__(self, layer: LayerSpec, spec: CacheSpec, block_size: int) -> None:
        def make(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=spec.dtype, device=spec.device)

        def numbers(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=spec.device)

        heads, dim, value_dim = layer.num_kv_heads, layer.head_dim, layer.value_head_dim
        self.query = make(TOKENS, layer.num_heads, dim)
        self.key, self.value = make(TOKENS, heads, dim), make(TOKENS, heads, value_dim)
        self.keys, self.values = make(TOKENS, block_size, heads, dim), make(TOKENS, block_size, heads, value_dim)
        self.tables = torch.zeros(1, 16, dtype=torch.int32, device=spec.device)
        self.starts, self.lengths = numbers(0, TOKENS), numbers(TOKENS)


def _decode(layer: LayerSpec, x: _Zeros) -> None:
    size = kernels.decode_workspace_bytes(1, layer.num_heads, x.keys, x.values)
    workspace = torch.zeros(size, dtype=torch.uint8, device=x.keys.device)
    kernels.decode_attention(
        x.query[:1], x.keys, x.values, x.tables, x.lengths, workspace, scale=1.0, window=layer.window or 0
    )


def _paged(layer: LayerSpec, x: _Zeros, invariant: bool = False) -> None:
    kernels.prefill_attention(
        x.query,
        x.keys,
        x.values,
        x.starts,
        scale=1.0,
        seq_lens=x.lengths,
        block_tables=x.tables,
        window=layer.window or 0,
        invariant=invariant,
    )


def _invariant(layer: LayerSpec, x: _Zeros) -> None:
    _paged(layer, x, invariant=True)


def _write(layer: LayerSpec, x: _Zeros) -> None:
    slots = torch.full((TOKENS,), -1, dtype=torch.int64, device=x.key.device)
    cos, sin = torch.zeros(2, TOKENS, layer.head_dim // 2, dtype=x.key.dtype, device=x.key.device)
    kernels.write_cache(x.key, x.value, x.keys, x.values, slots, query=x.query, cos=cos, sin=sin)
