"""Gated activations: act(gate) * up, as in SwiGLU and GeGLU (Shazeer, 2020)."""

import torch
import triton
import triton.language as tl

from .common import await_previous, overlap
from .heuristics import activation_config

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def activate(g, KIND: tl.constexpr):
    """KIND's activation of float32 `g`."""
    if KIND == 0:
        a = g / (1.0 + tl.exp(-g))
    elif KIND == 1:
        a = 0.5 * g * (1.0 + tl.math.erf(g * 0.7071067811865476))
    else:
        z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        a = g * (1.0 - 1.0 / (1.0 + tl.exp(2.0 * z)))  # (1 + tanh z) / 2 = 1 - 1 / (1 + exp 2 z)
    return a


@triton.jit
def _activation_kernel(
    gate_ptr, up_ptr, out_ptr, n, stride_g, stride_u, stride_o, KIND: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < n
    await_previous(PDL)
    g = tl.load(gate_ptr + row * stride_g + c, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * stride_u + c, mask=ok, other=0.0).to(tl.float32)
    a = activate(g, KIND)
    dtype = out_ptr.dtype.element_ty
    # act(gate) is rounded before the product, as where the two are modules of their own.
    tl.store(out_ptr + row * stride_o + c, (a.to(dtype).to(tl.float32) * u).to(dtype), mask=ok)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, kind: str) -> None:
    """gate, up, out [rows, n], unit stride within a row; writes `out`, which may be `gate` or `up`."""
    rows, n = gate.shape
    if not rows:
        return
    block, num_warps = activation_config(n, rows)
    _activation_kernel[(rows, triton.cdiv(n, block))](
        gate, up, out, n, gate.stride(0), up.stride(0), out.stride(0), KIND=KINDS[kind], BLOCK=block,
        num_warps=num_warps, **overlap(gate.device),
    )  # fmt: skip
