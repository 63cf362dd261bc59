"""What several kernels share."""

import os

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
