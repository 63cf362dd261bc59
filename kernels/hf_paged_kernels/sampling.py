"""Greedy choice and sampling: the best logit of each row, or the best of logit / temperature + Gumbel noise.

The latter draws from the softmax (Gumbel, 1954). `_pick_kernel` finds the best token of each piece of the vocabulary
among those that the row's threshold keeps (see `filters`), `_choose_kernel` the best of the pieces.

Noise comes from Philox-4x32-10 (Salmon et al., 2011) with counter (token id, position) and key seed, so that a draw
depends on the request's own seed, position and logits, and on nothing else in its batch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .common import await_previous, overlap
from .filters import kept_logits, thresholds
from .heuristics import sampling_config
from .op import op


@triton.jit
def _gumbel(seed, token, position):
    """Standard Gumbel noise from 32 random bits: -log(E), E = -log(1 - u), exact for small u, the largest noise."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(token).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, token.to(tl.uint32), zero + low, zero + high, zero)
    u = bits.to(tl.uint32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u = tl.minimum(u, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))


@triton.jit
def _pick_kernel(
    logits_ptr, temperature_ptr, least_ptr, seeds_ptr, positions_ptr, best_ptr, index_ptr, V, stride_l, pieces,
    RANDOM: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best token of one piece of one row's vocabulary, the first if several are equal."""
    await_previous(PDL)
    row = tl.program_id(0)
    piece = tl.program_id(1)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_l
    temperature = 0.0
    if RANDOM:
        temperature = tl.load(temperature_ptr + row)
        least = tl.load(least_ptr + row)
        seed = tl.load(seeds_ptr + row)
        position = tl.load(positions_ptr + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.full([BLOCK], 2147483647, tl.int32)
    for t in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, V), BLOCK):
        c = t + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + c, mask=c < V, other=float("-inf")).to(tl.float32)
        if RANDOM:  # noqa: SIM102  a constexpr prunes only as an `if` of its own
            if temperature > 0:
                kept = (x >= least) & (x > float("-inf"))
                if tl.max(kept.to(tl.int32), 0) > 0:
                    x = tl.where(kept, x / temperature + _gumbel(seed, c, position), float("-inf"))
                else:
                    x = tl.full([BLOCK], float("-inf"), tl.float32)
        better = (x > best) | ((index == 2147483647) & (c < V))
        best = tl.where(better, x, best)
        index = tl.where(better, c, index)
    top = tl.max(best, 0)
    tl.store(best_ptr + row * pieces + piece, top)
    tl.store(index_ptr + row * pieces + piece, tl.min(tl.where(best == top, index, 2147483647), 0))


@triton.jit
def _choose_kernel(best_ptr, index_ptr, out_ptr, pieces, BLOCK: tl.constexpr, PDL: tl.constexpr):
    await_previous(PDL)
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    best = tl.load(best_ptr + row * pieces + i, mask=i < pieces, other=float("-inf"))
    index = tl.load(index_ptr + row * pieces + i, mask=i < pieces, other=2147483647)
    token = tl.min(tl.where(best == tl.max(best, 0), index, 2147483647), 0)
    tl.store(out_ptr + row, tl.where(token == 2147483647, 0, token).to(tl.int64))


def _best(logits, temperature, least, seeds, positions, out) -> None:
    rows, vocab = logits.shape
    piece, block = sampling_config(rows, vocab)
    pieces = triton.cdiv(vocab, piece)
    best = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
    index = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    _pick_kernel[(rows, pieces)](
        logits, temperature, least, seeds, positions, best, index, vocab, logits.stride(0), pieces,
        RANDOM=temperature is not None, BLOCK=block, PIECE=piece, num_warps=4,
        **overlap(logits.device),
    )  # fmt: skip
    _choose_kernel[(rows,)](
        best, index, out, pieces, BLOCK=triton.next_power_of_2(pieces), num_warps=1, **overlap(logits.device)
    )


def _check_logits(logits: Tensor, out: Tensor | None) -> Tensor:
    checks.dense("logits", logits, (None, None), checks.FLOATS)
    if not logits.shape[1]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; the vocabulary must not be empty")
    if out is None:
        out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    checks.vector("out", out, logits.shape[0], (torch.int64,), logits.device)
    return out


def _argmax(logits, out):
    if logits.shape[0]:
        _best(logits, None, None, None, None, out)


def _argmax_reference(logits, out):
    top = logits.max(1, keepdim=True).values
    out.copy_((logits == top).int().argmax(1))


@op(_argmax, _argmax_reference, writes=("out",))
def argmax(logits: Tensor, *, out: Tensor | None = None, impl: str = "triton") -> Tensor:
    """The first index of the largest logit of each row: int64 [rows] of logits [rows, vocab]."""
    return _check_logits(logits, out)


def _sample(logits, out, temperature, seeds, positions, top_k, top_p, min_p):
    rows = logits.shape[0]
    if not rows:
        return
    least = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if top_k is None and top_p is None and min_p is None:
        least.fill_(float("-inf"))
    else:
        thresholds(logits, least, temperature, top_k, top_p, min_p)
    _best(logits, temperature, least, seeds, positions, out)


def philox(seed: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """First word of Philox-4x32-10 for counter (token, position low, position high, 0) and 64-bit key seed; int64."""
    mask = 0xFFFFFFFF

    def mul(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # 32 x 32 -> 64 bits in signed 64-bit arithmetic: by halves of b
        low = a * (b & 0xFFFF)
        high = a * (b >> 16) + (low >> 16)
        return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

    c0 = tokens.long() & mask
    c1, c2 = (positions.long() & mask).expand_as(c0), ((positions.long() >> 32) & mask).expand_as(c0)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed.long() & mask, (seed.long() >> 32) & mask
    for _ in range(10):
        high0, low0 = mul(0xD2511F53, c0)
        high2, low2 = mul(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Standard Gumbel noise [rows, vocab], float64, from the bits that the kernel draws."""
    tokens = torch.arange(vocab, device=seeds.device)[None].expand(seeds.shape[0], vocab)
    u = philox(seeds[:, None], tokens, positions[:, None]).double() * 2.0**-32 + 2.0**-33
    return -torch.log(-torch.log1p(-u))


def _sample_reference(logits, out, temperature, seeds, positions, top_k, top_p, min_p):
    """Argmax over kept tokens of logit / temperature + Gumbel noise; rows of temperature 0 take the argmax."""
    keep = kept_logits(logits, temperature, top_k, top_p, min_p)
    hot = (temperature > 0)[:, None]
    warm = torch.where(hot, temperature[:, None].double(), 1.0)
    noisy = logits.double() / warm + torch.where(hot, gumbel(seeds, positions, logits.shape[1]), 0.0)
    _argmax_reference(torch.where(keep | ~hot, noisy, -math.inf), out)


@op(_sample, _sample_reference, writes=("out",))
def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "triton",
) -> Tensor:
    """One token a row, int64 [rows], drawn from logits [rows, vocab] with each row's own parameters; no host sync.

    temperature float32 [rows] (0: argmax); seeds, positions int64 [rows]: noise is a function of (seed, position,
    token) alone; top_k int32 [rows] (0: off), top_p float32 (1: off), min_p float32 (0: off), applied in this order,
    after the temperature, as Transformers does. Tokens that equal a threshold all stay. None turns a filter off for all
    rows.
    """
    out = _check_logits(logits, out)
    rows, device = logits.shape[0], logits.device
    checks.vector("temperature", temperature, rows, (torch.float32,), device)
    checks.vector("seeds", seeds, rows, (torch.int64,), device)
    checks.vector("positions", positions, rows, (torch.int64,), device)
    if top_k is not None:
        checks.vector("top_k", top_k, rows, (torch.int32,), device)
    for name, x in (("top_p", top_p), ("min_p", min_p)):
        if x is not None:
            checks.vector(name, x, rows, (torch.float32,), device)
    return out
