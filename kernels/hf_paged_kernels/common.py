"""What several kernels share."""

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bfloat16: under it, operands are widened after they were rounded.
WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc=None):
    """Computes a @ b + acc in float32; float32 operands are multiplied as such, never as TF32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that may start before the one before it has ended; see `await_previous`.

    Programmatic dependent launch is Hopper's and later GPUs'; elsewhere the kernels start one after another.
    """
    able = not WIDEN.value and device.type == "cuda" and torch.version.cuda is not None
    if able and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Lets the next kernel's programs come in, then waits for the previous kernel's end.

    Every program of a kernel launched with `overlap` calls this before it touches what other kernels write or read:
    since each kernel of a chain waits so, the end of the one before means the end of all before. Only parameters of the
    model, which no kernel here writes, may be read before it.
    """
    if PDL:
        admit_next(PDL)
        tl.extra.cuda.gdc_wait()


@triton.jit
def admit_next(PDL: tl.constexpr):
    """Lets the next kernel's programs come in; they take room on the GPU."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
