"""Gated activations: act(gate) * up, as in SwiGLU and GeGLU (Shazeer, 2020)."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import checks
from .common import await_previous, overlap, wide
from .heuristics import activation_config
from .op import op

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
    # act(gate) is rounded before the product, as if activation and product were separate modules.
    tl.store(out_ptr + row * stride_o + c, (a.to(dtype).to(tl.float32) * u).to(dtype), mask=ok)


def activated(g: Tensor, kind: str) -> Tensor:
    """The activation `kind` of g in plain torch, in g's dtype."""
    if kind == "silu":
        return functional.silu(g)
    return functional.gelu(g, approximate="tanh" if kind == "gelu_tanh" else "none")


def _launch(gate, up, out, kind):
    rows, n = gate.shape
    if not rows:
        return
    block, num_warps = activation_config(n, rows)
    _activation_kernel[(rows, triton.cdiv(n, block))](
        gate, up, out, n, gate.stride(0), up.stride(0), out.stride(0), KIND=KINDS[kind], BLOCK=block,
        num_warps=num_warps, **overlap(gate.device),
    )  # fmt: skip


def _reference(gate, up, out, kind):
    """act(gate) rounded to out's dtype, times up."""
    g = wide(gate)
    out.copy_(activated(g, kind).to(out.dtype).to(g.dtype) * wide(up))


@op(_launch, _reference, writes=("out",))
def gated_activation(
    gate: Tensor, up: Tensor, *, kind: str = "silu", out: Tensor | None = None, impl: str = "triton"
) -> Tensor:
    """act(gate) * up for gate, up [rows, n] (row strides free: halves of a merged projection); returns `out` [rows, n].

    kind: "silu", "gelu" (erf) or "gelu_tanh". `out` may be `gate` or `up`.
    """
    checks.one_of("kind", kind, tuple(KINDS))
    checks.dense("gate", gate, (None, None), checks.FLOATS)
    if out is None:
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    checks.dense("up", up, gate.shape, (gate.dtype,), gate.device)
    checks.dense("out", out, gate.shape, (gate.dtype,), gate.device)
    return out
