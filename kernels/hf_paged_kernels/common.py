"""What several kernels and references share."""

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bfloat16: there, operands are converted to float32 first.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` as a reference computes with it: float64 as it is, anything else in float32."""
    return x if x.dtype == torch.float64 else x.float()


@triton.jit
def dot(a, b, acc=None):
    """Computes a @ b + acc in float32; float32 operands are multiplied as such, never as TF32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that may start before the previous kernel has ended; see `await_previous`.

    This is programmatic dependent launch, which Hopper and later GPUs have; on others the kernels run one by one.
    """
    able = not WIDEN.value and device.type == "cuda" and torch.version.cuda is not None
    if able and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Lets the next kernel's programs start, then waits until the previous kernel has ended.

    Every program of a kernel launched with `overlap` calls this before it reads or writes memory that other kernels
    use. Since each kernel of a chain waits like this, the end of the previous one means that all earlier ones have
    ended. Only parameters of the model, which no kernel here writes, may be read before the wait.
    """
    if PDL:
        admit_next(PDL)
        tl.extra.cuda.gdc_wait()


@triton.jit
def admit_next(PDL: tl.constexpr):
    """Lets the next kernel's programs start; they occupy multiprocessors beside this kernel's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
