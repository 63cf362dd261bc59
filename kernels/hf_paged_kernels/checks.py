"""Argument checks. Each raises TypeError or ValueError with the argument's name, its value, and what is allowed."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
PAGES = (16, 32, 64)
IMPLS = ("triton", "torch")


def one_of(name: str, value: object, allowed: tuple) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def tensor(
    name: str,
    x: Tensor,
    sizes: Sequence[int | None] | None,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """A tensor of the shape `sizes`, where None allows any size, of one of `dtypes`, on `device` (None: any)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
    if sizes is not None and x.dim() != len(sizes):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {len(sizes)} dimensions")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; allowed are {', '.join(map(str, dtypes))}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, as the other tensors are")
    for have, want in zip(x.shape, sizes or (), strict=False):
        if want is not None and have != want:
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{wanted}]")


def dense(
    name: str,
    x: Tensor,
    sizes: Sequence[int | None],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """A `tensor` whose last dimension is contiguous."""
    tensor(name, x, sizes, dtypes, device)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {x.stride()}; its last dimension must be contiguous (stride 1)")


def vector(name: str, x: Tensor, length: int | None, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """A contiguous 1-D tensor of `length` elements, or of any number."""
    tensor(name, x, (length,), dtypes, device)
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}; it must be contiguous")


def implementation(impl: str, device: torch.device) -> None:
    """`impl` is known, and can run where the tensors are."""
    one_of("impl", impl, IMPLS)
    if impl == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"impl is 'triton' and the tensors are on {device}; allowed are CUDA tensors, or impl='torch'")


def caches(k_cache: Tensor, v_cache: Tensor, device: torch.device) -> None:
    """Two paged caches [blocks, page, kv heads, dim] of one dtype."""
    dense("k_cache", k_cache, (None,) * 4, (*FLOATS, FP8), device)
    dense("v_cache", v_cache, (*k_cache.shape[:3], None), (k_cache.dtype,), device)
    one_of("block size (k_cache.shape[1])", k_cache.shape[1], PAGES)


def scales(key: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """float32 scales of one element or one a KV head if `key` [.., kv heads, dim] is fp8, else None."""
    fp8 = key.dtype == FP8
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != fp8:
            need = "given with a float8_e4m3fn cache" if fp8 else "None unless the cache is float8_e4m3fn"
            raise ValueError(f"{name} is {'None' if scale is None else 'given'}; it must be {need}")
        if fp8:
            vector(name, scale, None, (torch.float32,), key.device)
            one_of(f"{name}.numel()", scale.numel(), (1, key.shape[-2]))
