"""Linear layers, with the norm before and the gated activation or residual add behind them.

A decode step spends its time reading weights. `hopper_linear` streams them on Hopper, and `hopper_matmul` multiplies
many tokens there. The kernel here serves what those do not: any shape and stride, any GPU that Triton serves, the
interpreter. In it, as in `hopper_linear`, a tile of weights is the left operand: result[rows of weight, tokens].
"""

import torch
import triton
import triton.language as tl

from . import norm
from .activation import KINDS, activate
from .common import await_previous, dot, overlap
from .heuristics import (
    PortableConfig,
    invariant_linear_config,
    linear_config,
    linear_serves,
    matmul_config,
    portable_linear_config,
)

try:
    from . import copies, hopper_linear, hopper_matmul
except ImportError:  # a Triton without Gluon, or with another one: the portable kernel serves all calls
    copies = hopper_linear = hopper_matmul = None

FEW = 64  # tokens that one tile of `hopper_linear` holds: for more, it would read the weights again


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, tokens, n, k, stride_x, stride_w, stride_r, stride_o,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_T tokens; with KIND from 0 on, the gate's row c and the up projection's row n + c."""
    await_previous(PDL)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c_ok = c < n
    t_ok = t < tokens
    w_at = w_ptr + c.to(tl.int64)[:, None] * stride_w
    up_at = w_ptr + (c.to(tl.int64) + n)[:, None] * stride_w
    x_at = x_ptr + t[:, None] * stride_x
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, k, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        i_ok = (i < k)[None, :]
        x = tl.trans(tl.load(x_at + i[None, :], mask=t_ok[:, None] & i_ok, other=0.0))
        acc = dot(tl.load(w_at + i[None, :], mask=c_ok[:, None] & i_ok, other=0.0), x, acc)
        if KIND >= 0:
            up = dot(tl.load(up_at + i[None, :], mask=c_ok[:, None] & i_ok, other=0.0), x, up)
    if BIAS:
        acc += tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[:, None]
        if KIND >= 0:
            up += tl.load(bias_ptr + n + c, mask=c_ok, other=0.0).to(tl.float32)[:, None]
    if KIND >= 0:
        acc = activate(acc, KIND) * up
    ok = c_ok[:, None] & t_ok[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + t[None, :] * stride_r + c[:, None], mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + t[None, :] * stride_o + c[:, None], acc.to(out_ptr.dtype.element_ty), mask=ok)


def _portable(x, weight, bias, residual, kind: int, out, config: PortableConfig) -> None:
    tokens, k = x.shape
    n = out.shape[1]
    r = out if residual is None else residual
    _linear_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(tokens, config.block_t))](
        x, weight, bias, r, out, tokens, n, k, x.stride(0), weight.stride(0), r.stride(0), out.stride(0), KIND=kind,
        BIAS=bias is not None, RESIDUAL=residual is not None, BLOCK_T=config.block_t, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages, **overlap(x.device),
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    gemma: bool,
    residual: torch.Tensor | None,
    gate: str | None,
    invariant: bool,
    out: torch.Tensor,
) -> None:
    """Writes `out`, which may be `residual`; see `api.linear`.

    The norm is a launch of its own: within the product, its pass over the tokens held up the weights. It costs little,
    for the product's programs come in meanwhile and ask for weights (see `common.await_previous`).
    """
    tokens, k = x.shape
    if not tokens:
        return
    if norm_weight is not None:
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        norm.rms_norm(x[:, None], norm_weight, normed[:, None], None, eps, gemma, invariant)
        x = normed
    kind = -1 if gate is None else KINDS[gate]
    if copies is not None and tokens <= FEW and copies.copyable(x, weight):
        config = linear_config(tokens, out.shape[1], k, gate is not None, x.device, splits=not invariant)
        hopper_linear.linear(x, weight, bias, residual, kind, out, config)
        return
    if copies is not None and tokens > FEW and copies.copyable(x, weight, out):
        many = matmul_config(FEW * triton.cdiv(tokens, FEW), out.shape[1], gate is not None, x.device)
        hopper_matmul.linear(x, weight, bias, residual, kind, out, many)
        return
    tile = portable_linear_config(tokens)
    if invariant:
        tile = invariant_linear_config(tokens, x.element_size(), gate is not None, x.device)
    _portable(x, weight, bias, residual, kind, out, tile)


def serves(tokens: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight [n, k] at so many tokens is among what was measured to beat cuBLAS, or lies between."""
    if copies is None or not copies.runs_on(device) or dtype not in copies.DTYPES:
        return False
    return linear_serves(tokens, n, k)
