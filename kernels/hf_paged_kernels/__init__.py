"""Triton kernels for paged inference, each with a plain torch reference that is its specification. See `api`."""

from .api import (
    argmax,
    block_copy_bases,
    copy_blocks,
    decode_attention,
    decode_workspace_bytes,
    gated_activation,
    linear,
    linear_serves,
    plan_decode,
    prefill_attention,
    rms_norm,
    sample,
    write_cache,
)

__all__ = [
    "argmax",
    "block_copy_bases",
    "copy_blocks",
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
