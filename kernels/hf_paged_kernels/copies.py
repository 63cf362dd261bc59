"""Hopper's tensor-copy engine (TMA) in Gluon: swizzled tiles in shared memory, barriers, descriptors."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .common import WIDEN

DTYPES = (torch.float16, torch.bfloat16)
CHUNK = 64  # 2-byte elements in the 128 bytes that the copy engine swizzles
# Names that moved between the Triton versions tried, 3.6 and 3.9.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
PRIVATE_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))


@gluon.jit
def pieces(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr):
    """Shared memory for COUNT swizzled pieces [ROWS, 64]."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    return gl.allocate_shared_memory(dtype, [COUNT, ROWS, 64], SHARED)


@gluon.jit
def whole(buffer, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The same memory as COUNT tiles [ROWS, COLUMNS]: a swizzled tile is its 64-column chunks, one after the other."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    if PRIVATE_REINTERPRET:
        tiles = buffer._reinterpret(buffer.dtype, [COUNT, ROWS, COLUMNS], SHARED)
    else:
        tiles = buffer.reinterpret(buffer.dtype, [COUNT, ROWS, COLUMNS], SHARED)
    return tiles


@gluon.jit
def barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """(full, empty) barriers of each stage: full when its copies have arrived, empty when READERS have read it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=READERS)
    return full, empty


@cache
def runs_on(device: torch.device) -> bool:
    """Whether `device` is a Hopper GPU."""
    return not WIDEN.value and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def copyable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine takes rows of these [rows, columns]: on Hopper, a 2-byte dtype, 16-byte aligned."""
    return all(
        runs_on(x.device)
        and x.dtype in DTYPES
        and x.data_ptr() % 16 == 0
        and x.stride(0) % 8 == 0
        and x.stride(0) >= x.shape[1] > 0
        for x in tensors
    )


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor that copies `rows` rows of x by one column chunk, and zeros beyond its edges."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, CHUNK], layout)
