"""The plan: stretches and decode work lists, once a step; cache write and attention, once a layer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

import hf_paged_kernels as kernels
from hf_paged.batch import Batch, LayerSpec
from hf_paged.protocols import KVCache
from hf_paged_triton.stretches import Stretch, one_stretch, stretches


class TritonPlan:
    """One step over the cache, never waiting for the device.

    Everything that it launches is ordered before later work of the current stream.
    """

    def __init__(self, batch: Batch, cache: KVCache, deterministic: bool = False) -> None:
        self._deterministic = deterministic
        self._cache = cache
        self._layers = cache.spec.layers
        self._groups = [cache.spec.group_of(layer) for layer in range(len(self._layers))]
        self._slots = batch.slot_mapping
        device = cache.spec.device
        # Triton launches on the current device, even if the tensors are on another.
        self._on_device: AbstractContextManager[Any] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )
        with self._on_device:
            self._decode, self._paged, self._fresh = (one_stretch if deterministic else stretches)(batch)
            self._workspaces = {} if self._decode is None else _workspaces(self._decode, cache)

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        # Under autocast a layer's queries and keys may have another dtype than its values; the cache has one dtype.
        query, key, value = (_dense(x.to(keys.dtype)) for x in (query, key, value))
        with self._on_device:
            kernels.write_cache(key, value, keys, values, self._slots[self._groups[layer]])
            return self._attend(layer, query, key, value, scale, softcap, sinks)

    def run_rotary(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        # Fresh rows read their keys from `key`; all others from the cache.
        rotated: dict[str, Any] = {"key_out": key} if self._fresh else {}
        with self._on_device:
            kernels.write_cache(
                key, value, keys, values, self._slots[self._groups[layer]],
                query=query, cos=cos, sin=sin, interleaved=interleaved, **rotated,
            )  # fmt: skip
            return self._attend(layer, query, key, value, scale, softcap, sinks)

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention, after this step's keys and values were written to the cache."""
        spec, group = self._layers[layer], self._groups[layer]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = query.new_empty(*query.shape[:2], spec.value_head_dim)
        options: dict[str, Any] = {
            "scale": scale,
            "window": spec.window or 0,
            "softcap": softcap or 0.0,
            "sinks": sinks,
        }
        # Decode rows are limited by memory bandwidth: prompts of a few tokens cost little if they run at the same time.
        side = _side_stream(query.device) if self._decode and (self._paged or self._fresh) else None
        with torch.cuda.stream(side):
            if rows := self._paged:
                own, starts = rows.tokens, rows.query_start_loc
                lengths: dict[str, Any] = {"seq_lens": rows.seq_lens, "block_tables": rows.block_tables[group]}
                lengths["invariant"] = self._deterministic
                kernels.prefill_attention(query[own], keys, values, starts, out=out[own], **lengths, **options)
            if rows := self._fresh:
                own, starts = rows.tokens, rows.query_start_loc
                kernels.prefill_attention(query[own], key[own], value[own], starts, out=out[own], **options)
        if rows := self._decode:
            own, tables, workspace = rows.tokens, rows.block_tables[group], self._workspaces[spec]
            given = (query[own], keys, values, tables, rows.seq_lens, workspace)
            kernels.decode_attention(*given, out=out[own], planned=True, **options)
        if side is not None:
            torch.cuda.current_stream(query.device).wait_stream(side)
        return out


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for launches that may run at the same time as the current stream's next one, if a graph is captured.

    In an eager launch, the events that synchronize the two would take the host longer than the overlap saves.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return None
    side = _stream_of(device)
    side.wait_stream(torch.cuda.current_stream(device))
    return side


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _workspaces(rows: Stretch, cache: KVCache) -> dict[LayerSpec, torch.Tensor]:
    """A workspace with the step's decode work list for each kind of layer: allocated each step, and zeroed.

    torch's allocator reuses the memory, so that this costs one launch a kind of layer. No state remains that could
    disturb a step with another number of rows or on another stream.
    """
    planned: dict[LayerSpec, torch.Tensor] = {}
    for index, layer in enumerate(cache.spec.layers):
        if layer in planned:
            continue
        keys, values = cache.keys[index], cache.values[index]
        size = kernels.decode_workspace_bytes(len(rows.seq_lens), layer.num_heads, keys, values)
        planned[layer] = torch.zeros(size, dtype=torch.uint8, device=keys.device)
        kernels.plan_decode(rows.seq_lens, planned[layer], keys, values, window=layer.window or 0)
    return planned


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` with its last dimension contiguous, as the kernels need it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
