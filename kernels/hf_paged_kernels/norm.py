"""RMSNorm (Zhang & Sennrich, 2019), with and without the residual add that comes before it in a decoder layer."""

import torch
import triton
import triton.language as tl

from .common import await_previous, overlap
from .heuristics import norm_config


# Sizes that change from step to step: no variant of their own for 1 or for multiples of 16, compiled as they turn up.
@triton.jit(do_not_specialize=["rows", "inner_rows"])
def _norm_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, eps, rows, inner_rows,
    stride_xo, stride_xi, stride_ro, stride_ri, stride_oo, stride_oi,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr,
    GEMMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows; row r lies at (r // inner_rows, r % inner_rows) of the two outer dimensions."""
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
        # Rounded to the residual's dtype before it is normed: what an add and a norm apart from each other give.
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


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    gemma: bool,
    invariant: bool = False,
) -> None:
    """x, out, residual [outer, inner, n] with any outer strides; writes `out`, and x + residual into `residual`."""
    outer, inner, n = x.shape
    rows = outer * inner
    if not rows:
        return
    block_m, num_warps = norm_config(n, None if invariant else rows)
    r = x if residual is None else residual
    _norm_kernel[(triton.cdiv(rows, block_m),)](
        x, weight, residual, out, eps, rows, inner, x.stride(0), x.stride(1), r.stride(0), r.stride(1),
        out.stride(0), out.stride(1), N=n, BLOCK_N=triton.next_power_of_2(n), BLOCK_M=block_m,
        RESIDUAL=residual is not None, WEIGHT=weight is not None, GEMMA=gemma, num_warps=num_warps,
        **overlap(x.device),
    )  # fmt: skip
