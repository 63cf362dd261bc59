"""Linear layers, with the norm before and the gated activation or residual add after them.

The time of a decode step is that of reading weights. `hopper_linear` streams them on Hopper, and `hopper_matmul`
multiplies many tokens there. The kernel in this file serves all other calls: any shape and stride, any GPU that Triton
serves, the interpreter. In it, as in `hopper_linear`, a tile of weights is the left operand: result[rows of weight,
tokens].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, heuristics, norm
from .activation import KINDS, activate, activated
from .common import await_previous, dot, overlap, wide
from .op import op

try:
    from . import copies, hopper_linear, hopper_matmul
except ImportError:  # Triton has no Gluon, or an incompatible one: the portable kernel serves all calls
    copies = hopper_linear = hopper_matmul = None

FEW = 64  # tokens in the one tile of `hopper_linear`


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, tokens, n, k, stride_x, stride_w, stride_r, stride_o,
    KIND: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_T tokens; if KIND >= 0, from row c of the gate and row n + c of the up projection."""
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


def _portable(x, weight, bias, residual, kind: int, out, config: heuristics.PortableConfig) -> None:
    tokens, k = x.shape
    n = out.shape[1]
    r = out if residual is None else residual
    _linear_kernel[(triton.cdiv(n, config.block_n), triton.cdiv(tokens, config.block_t))](
        x, weight, bias, r, out, tokens, n, k, x.stride(0), weight.stride(0), r.stride(0), out.stride(0), KIND=kind,
        BIAS=bias is not None, RESIDUAL=residual is not None, BLOCK_T=config.block_t, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages, **overlap(x.device),
    )  # fmt: skip


def _launch(x, weight, bias, norm_weight, eps, gemma, residual, gate, invariant, out):
    """Launches the norm by itself: inside the product, its pass over the tokens delayed the weights.

    It costs little, since the product's programs start meanwhile and request weights (see `common.await_previous`).
    """
    tokens, k = x.shape
    n = out.shape[1]
    if not tokens:
        return
    if norm_weight is not None:
        normed = torch.empty_like(x, memory_format=torch.contiguous_format)
        norm.launch(x[:, None], norm_weight, None, normed[:, None], eps, gemma, invariant)
        x = normed
    kind = -1 if gate is None else KINDS[gate]
    gated = gate is not None
    if copies is not None and tokens <= FEW and copies.copyable(x, weight):
        config = heuristics.linear_config(tokens, n, k, gated, x.device, splits=not invariant)
        hopper_linear.launch(x, weight, bias, residual, kind, out, config)
    elif copies is not None and tokens > FEW and copies.copyable(x, weight, out):
        many = heuristics.matmul_config(FEW * triton.cdiv(tokens, FEW), n, gated, x.device)
        hopper_matmul.launch(x, weight, bias, residual, kind, out, many)
    elif invariant:
        tile = heuristics.invariant_linear_config(tokens, x.element_size(), gated, x.device)
        _portable(x, weight, bias, residual, kind, out, tile)
    else:
        _portable(x, weight, bias, residual, kind, out, heuristics.portable_linear_config(tokens))


def _reference(x, weight, bias, norm_weight, eps, gemma, residual, gate, out):
    """Gives x W^T + bias of x, or of its `rms_norm` (rounded to x's dtype); then act(gate) * up; then + residual."""
    if norm_weight is not None:
        normed = torch.empty_like(x)
        norm.reference(x, norm_weight, None, normed, eps, gemma)
        x = normed
    y = wide(x) @ wide(weight).T
    if bias is not None:
        y = y + bias.to(y.dtype)
    if gate is not None:
        g, up = y.chunk(2, -1)
        y = activated(g, gate) * up
    if residual is not None:
        y = y + residual.to(y.dtype)
    out.copy_(y)


@op(_launch, _reference, writes=("out",))
def linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    gemma: bool = False,
    residual: Tensor | None = None,
    gate: str | None = None,
    invariant: bool = False,
    out: Tensor | None = None,
    impl: str = "triton",
) -> Tensor:
    """A linear layer, with what surrounds it in a decoder layer; returns `out` [tokens, n].

    x [tokens, k], float16 or bfloat16, with any row stride; weight [n, k], as torch.nn.Linear holds it, with any row
    stride; bias [n]. In this order: with norm_weight [k], x is first normed, as by `rms_norm` with this `eps` and
    `gemma`; then out = x W^T + bias, in float32. With `gate` ("silu", "gelu" or "gelu_tanh"), weight is [2 n, k] and
    bias [2 n]: the first half of the rows is the gate projection's, the second the up projection's, and out =
    act(gate) * up. Then `residual` [tokens, n] is added. The result is rounded once, at the end. `out` may be
    `residual`, and must not overlap x. A new `out` is contiguous.

    Any number of tokens works; `linear_serves` tells where it is faster than cuBLAS. If rows of x, of weight or, with
    more than 64 tokens, of out are not 16-byte aligned, a slower kernel runs. `invariant`: a token's result has the
    same bits for any number of tokens; x may be float32 then.

    On Hopper the weights are read before the previous kernel has ended, if that is one of this package: none of these
    may write weight or norm_weight right before.
    """
    checks.dense("x", x, (None, None), checks.FLOATS if invariant else checks.HALVES)
    tokens, k = x.shape
    checks.dense("weight", weight, (None, k), (x.dtype,), x.device)
    n = rows = weight.shape[0]
    if not rows or not k:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must not be empty")
    if gate is not None:
        checks.one_of("gate", gate, tuple(KINDS))
        if rows % 2:
            raise ValueError(f"weight has {rows} rows; with a gate, gate and up projection must be half of them each")
        n = rows // 2
    if bias is not None:
        checks.vector("bias", bias, rows, checks.FLOATS, x.device)
    if norm_weight is not None:
        checks.vector("norm_weight", norm_weight, k, checks.FLOATS, x.device)
        if k > 32768:
            raise ValueError(f"x has rows of {k} elements; with a norm, allowed are 1 to 32768")
    if eps < 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    if residual is not None:
        checks.dense("residual", residual, (tokens, n), (x.dtype,), x.device)
    if out is None:
        out = x.new_empty(tokens, n)
    checks.dense("out", out, (tokens, n), (x.dtype,), x.device)
    return out


def linear_serves(
    tokens: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    norm: bool = False,
    gate: bool = False,
) -> bool:
    """True if `linear` was measured faster than cuBLAS and separate kernels for a weight [n, k] at this many tokens.

    Sizes between measured ones count as measured. `n` counts all rows of the weight, gate and up projection together.
    `norm` and `gate`, whether the call has them, are ignored for now: only whole layers were measured, since kernels of
    this package overlap, and another kernel between them costs more than it may win.
    """
    device = torch.device(device)
    if copies is None or not copies.runs_on(device) or dtype not in copies.DTYPES:
        return False
    return heuristics.linear_beats_cublas(tokens, n, k)
