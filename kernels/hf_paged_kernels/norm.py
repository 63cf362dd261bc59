"""RMSNorm (Zhang & Sennrich, 2019), with or without the residual add that precedes it in a decoder layer."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .common import await_previous, overlap, wide
from .heuristics import norm_config
from .op import op


# Sizes that change from step to step are not specialized: Triton compiles no variant for 1 or for multiples of 16.
@triton.jit(do_not_specialize=["rows", "inner_rows"])
def _norm_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, eps, rows, inner_rows,
    stride_xo, stride_xi, stride_ro, stride_ri, stride_oo, stride_oi,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr,
    GEMMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norms BLOCK_M rows; row r is at (r // inner_rows, r % inner_rows) of the two outer dimensions."""
    r = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    outer = r // inner_rows
    inner = r % inner_rows
    c = tl.arange(0, BLOCK_N)
    ok = (r < rows)[:, None] & (c < N)[None, :]
    if WEIGHT:
        w = tl.load(weight_ptr + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    await_previous(PDL)
    x_at = x_ptr + (outer * stride_xo + inner * stride_xi)[:, None] + c[None, :]
    x = tl.load(x_at, mask=ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        r_at = residual_ptr + (outer * stride_ro + inner * stride_ri)[:, None] + c[None, :]
        # Rounded to the residual's dtype before the norm, as a separate add and norm would.
        total = (x + tl.load(r_at, mask=ok, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(r_at, total, mask=ok)
        x = total.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / N + eps)[:, None]
    if WEIGHT:
        if GEMMA:
            y = y * (1.0 + w)
        else:
            y = y.to(out_ptr.dtype.element_ty).to(tl.float32) * w
    out_at = out_ptr + (outer * stride_oo + inner * stride_oi)[:, None] + c[None, :]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=ok)


def _three(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.view(-1, 1, x.shape[-1])


def launch(x, weight, residual, out, eps, gemma, invariant):
    """Writes `out`, and x + residual into `residual`."""
    x, out = _three(x), _three(out)
    outer, inner, n = x.shape
    rows = outer * inner
    if not rows:
        return
    block_m, num_warps = norm_config(n, None if invariant else rows)
    r = x if residual is None else _three(residual)
    _norm_kernel[(triton.cdiv(rows, block_m),)](
        x, weight, None if residual is None else r, out, eps, rows, inner, x.stride(0), x.stride(1), r.stride(0),
        r.stride(1), out.stride(0), out.stride(1), N=n, BLOCK_N=triton.next_power_of_2(n), BLOCK_M=block_m,
        RESIDUAL=residual is not None, WEIGHT=weight is not None, GEMMA=gemma, num_warps=num_warps,
        **overlap(x.device),
    )  # fmt: skip


def reference(x, weight, residual, out, eps, gemma):
    """Gives x / sqrt(mean(x^2) + eps), rounded to out's dtype and then times weight, or (Gemma) times 1 + weight."""
    if residual is not None:
        residual.copy_(wide(x) + wide(residual))
        x = residual
    x = wide(x)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (1 + weight.to(y.dtype)) if gemma else y.to(out.dtype).to(y.dtype) * weight.to(y.dtype)
    out.copy_(y)


@op(launch, reference, writes=("out", "residual"))
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    gemma: bool = False,
    invariant: bool = False,
    impl: str = "triton",
) -> Tensor:
    """RMSNorm over the last dimension; returns `out`, of x's shape and dtype (default: new; it may be `x`).

    With `residual`, first residual += x, in place, and the sum is normed. weight [n], or None. `gemma`: the weight
    counts as 1 + weight, and nothing is rounded before the product. 3-D x may have any outer strides (heads of a merged
    projection); other shapes must be contiguous. `invariant`: a row's result has the same bits for any number of rows.
    """
    checks.tensor("x", x, None, checks.FLOATS)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for name, y in (("x", x), ("residual", residual), ("out", out)):
        if y is None:
            continue
        checks.dense(name, y, x.shape, (x.dtype,), x.device)
        if x.dim() != 3 and not y.is_contiguous():
            raise ValueError(f"{name} has strides {y.stride()}; it must be contiguous unless it has 3 dimensions")
    if not 1 <= x.shape[-1] <= 32768:
        raise ValueError(f"x has rows of {x.shape[-1]} elements; allowed are 1 to 32768")
    if weight is not None:
        checks.vector("weight", weight, x.shape[-1], checks.FLOATS, x.device)
    return out
