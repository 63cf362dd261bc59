"""The Triton attention backend: serves CUDA GPUs, over the kernels of `hf_paged_kernels`.

A step's rows are split into at most three stretches, each one launch a layer: the leading rows of one query (decode),
rows that read keys of earlier steps through their block tables, and whole prompts if they are long, whose keys are read
from the layer's own tensors. In deterministic mode all rows are one stretch. Lengths and tables stay on the device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hf_paged import hookimpl
from hf_paged.batch import CacheSpec
from hf_paged.protocols import AttentionBackend

if TYPE_CHECKING:
    import torch

NAME = "triton"
# What the kernels support, repeated here so that a check does not import them.
DTYPES = ("float32", "float16", "bfloat16")
LARGEST_HEAD = 256
BLOCK_SIZES = (16, 32, 64)
OLDEST_GPU = (8, 0)  # compute capability


@hookimpl
def register_attention_backends(
    register: Callable[[str, Callable[[CacheSpec], AttentionBackend]], None], config: Any
) -> None:
    """Offer the backend under the name "triton", for the block sizes that it serves or if the config names it."""

    def build(spec: CacheSpec) -> AttentionBackend:
        if config.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"block_size={config.block_size}; its kernels take {sizes}")
        if reason := why_not(spec, spec.device):
            raise ValueError(reason)
        from hf_paged_triton.backend import TritonBackend

        return TritonBackend(spec, config.block_size, config.deterministic)

    if config.block_size in BLOCK_SIZES or config.attention_backend == NAME:
        register(NAME, build)


@hookimpl
def select_attention_backend(spec: CacheSpec, device: torch.device, names: Sequence[str]) -> str | None:
    """Serve a CUDA GPU, where the kernels can; leave everything else to others."""
    return NAME if NAME in names and device.type == "cuda" and why_not(spec, device) is None else None


def why_not(spec: CacheSpec, device: torch.device) -> str | None:
    """Why the kernels can't serve these layers on this device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if reason := _why_not_on(device):
        return reason
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        return f"keys and values are {dtype}; its kernels take {', '.join(DTYPES)}"
    sizes = sorted({size for layer in spec.layers for size in (layer.head_dim, layer.value_head_dim)})
    if sizes[-1] > LARGEST_HEAD:
        return f"a head has {sizes[-1]} elements; its kernels take {LARGEST_HEAD} at most"
    return None


def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"the model is on {device.type}; its kernels need a CUDA GPU"
    import torch

    if torch.version.cuda is None:
        return "its kernels were never tried on a GPU that is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"{device} has compute capability {capability[0]}.{capability[1]}; its kernels need 8.0"
    return None
