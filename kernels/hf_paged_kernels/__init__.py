"""Triton kernels for paged inference: one file an op, with a plain torch reference that is the kernel's specification.

`impl="triton"` needs CUDA tensors (or Triton's interpreter); `impl="torch"` runs the reference, on any device, and
waits for the device where it must. Neither replaces the other silently. `debug=True` also checks the values of device
metadata, which waits for the device. Shapes in the docstrings: `tokens` flat query tokens, `rows` sequences, `blocks`
of `page` tokens in the pool.
"""

from .activation import gated_activation
from .cache import write_cache
from .decode import decode_attention, decode_workspace_bytes, plan_decode
from .linear import linear, linear_serves
from .norm import rms_norm
from .prefill import prefill_attention
from .sampling import argmax, sample

__all__ = [
    "argmax",
    "decode_attention",
    "decode_workspace_bytes",
    "gated_activation",
    "linear",
    "linear_serves",
    "plan_decode",
    "prefill_attention",
    "rms_norm",
    "sample",
    "write_cache",
]
