"""The filters of sampling, top-k, top-p and min-p, as a threshold on each row's logits: no sort and no host sync.

Top-k and top-p thresholds are found by bisection on sortable integer keys. `_survey_kernel` reduces the vocabulary to
maxima of groups; the m-th largest of these is a lower bound of the m-th largest logit (`_bound_kernel`), so that
`_gather_kernel` can put all logits that may matter into a small array, on which `_threshold_kernel` is fast. If that
array doesn't hold enough of the mass (a flat distribution under top-p, or k over 1,024), the whole row is searched
instead: slow, and as exact.

A row's threshold depends on nothing else in its batch: the masses of gathered logits, whose order varies, are summed
in 64-bit fixed point.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 64  # logits to a maximum
PIECE = 4096  # logits to a program; the same for any batch, since the mass's rounding depends on it
REACH = 1024  # rank of the group maximum that bounds what is gathered, unless top-k gives another
CAPACITY = 2048  # logits gathered at most


@triton.jit
def _key(x):
    """float32 -> int32 of the same order (two's complement for negative floats)."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _from_key(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _scan(row_ptr, V, lowest, top, inverse, pivots, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """For each pivot key: how many kept logits (key >= lowest) have a key at or above it, and their exp-mass."""
    count = tl.zeros([PIVOTS, BLOCK], tl.int32)
    mass = tl.zeros([PIVOTS, BLOCK], tl.float32)
    for t in range(0, V, BLOCK):
        c = t + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + c, mask=c < V, other=float("-inf")).to(tl.float32)
        k = _key(x)
        e = tl.exp((x - top) * inverse)
        above = (k[None, :] >= pivots[:, None]) & (k >= lowest)[None, :]
        count += above.to(tl.int32)
        mass += tl.where(above, e[None, :], 0.0)
    return tl.sum(count, 1), tl.sum(mass, 1)


@triton.jit
def _search(row_ptr, V, lowest, low, high, top, inverse, want, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key with at least `want` logits, or an exp-mass of `want`, at or above it.

    Invariant: low's logits are enough, high's are not. It ends when at most one logit, or no key, is between them.
    """
    PIVOTS: tl.constexpr = 8
    i = tl.arange(0, PIVOTS)
    n_low = V
    n_high = 0
    gap = high.to(tl.int64) - low.to(tl.int64)  # keys of both signs: their distance needs 64 bits
    while (n_low - n_high > 1) & (gap > 1):
        pivots = low.to(tl.int64) + tl.maximum(gap * (i + 1).to(tl.int64) // (PIVOTS + 1), 1)
        pivots = tl.minimum(pivots, high.to(tl.int64) - 1).to(tl.int32)
        count, mass = _scan(row_ptr, V, lowest, top, inverse, pivots, BLOCK, PIVOTS)
        if BY_MASS:
            enough = mass >= want
        else:
            enough = count >= want
        n_low = tl.minimum(n_low, tl.min(tl.where(enough, count, 2147483647), 0))
        n_high = tl.maximum(n_high, tl.max(tl.where(enough, 0, count), 0))
        low = tl.maximum(low, tl.max(tl.where(enough, pivots, -2147483648), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, 2147483647, pivots), 0))
        gap = high.to(tl.int64) - low.to(tl.int64)
    return low


@triton.jit
def _filters(row, top_k_ptr, top_p_ptr, min_p_ptr, V, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr):
    """A row's (k, p, min-p); V, 1 and 0 where it has none."""
    k = V
    p = 1.0
    mp = 0.0
    if TOP_K:
        k = tl.load(top_k_ptr + row).to(tl.int32)
        k = tl.where((k <= 0) | (k > V), V, k)
    if TOP_P:
        p = tl.load(top_p_ptr + row).to(tl.float32)
    if MIN_P:
        mp = tl.load(min_p_ptr + row).to(tl.float32)
    return k, p, mp


@triton.jit
def _survey_kernel(
    logits_ptr, temperature_ptr, maxima_ptr, sums_ptr, V, stride_l, groups, pieces,
    GROUP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Group maxima of one piece of one row, and the piece's exp-mass relative to its own maximum."""
    row = tl.program_id(0)
    piece = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        at = piece * PIECE + tl.arange(0, PIECE)
        x = tl.load(logits_ptr + row.to(tl.int64) * stride_l + at, mask=at < V, other=float("-inf")).to(tl.float32)
        best = tl.max(tl.reshape(x, [PIECE // GROUP, GROUP]), 1)
        g = piece * (PIECE // GROUP) + tl.arange(0, PIECE // GROUP)
        tl.store(maxima_ptr + row * groups + g, best, mask=g < groups)
        top = tl.maximum(tl.max(best, 0), -3.0e38)
        tl.store(sums_ptr + (row * pieces + piece) * 2, top)
        tl.store(sums_ptr + (row * pieces + piece) * 2 + 1, tl.sum(tl.exp((x - top) / temperature), 0))


@triton.jit
def _select(keys, weights, low, high, want):
    """The largest key in [low, high) such that the weights of keys at or above it sum to at least `want`; low's do."""
    gap = high.to(tl.int64) - low.to(tl.int64)
    while gap > 1:
        middle = (low.to(tl.int64) + gap // 2).to(tl.int32)
        enough = tl.sum(tl.where(keys >= middle, weights, 0), 0) >= want
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        gap = high.to(tl.int64) - low.to(tl.int64)
    return low


@triton.jit
def _bound_kernel(
    temperature_ptr, top_k_ptr, top_p_ptr, maxima_ptr, sums_ptr, bounds_ptr, counts_ptr, V, groups, pieces,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """bounds[row] = (least logit to gather, inf for none; the row's maximum; its exp-mass relative to that)."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    k, p, _ = _filters(row, top_k_ptr, top_p_ptr, top_p_ptr, V, TOP_K, TOP_P, False)
    tl.store(counts_ptr + row, 0)
    bound = float("inf")
    if temperature > 0:
        i = tl.arange(0, BLOCK_P)
        tops = tl.load(sums_ptr + (row * pieces + i) * 2, mask=i < pieces, other=float("-inf"))
        sums = tl.load(sums_ptr + (row * pieces + i) * 2 + 1, mask=i < pieces, other=0.0)
        top = tl.max(tops, 0)
        tl.store(bounds_ptr + row * 3 + 1, top)
        tl.store(bounds_ptr + row * 3 + 2, tl.sum(sums * tl.exp((tops - top) / temperature), 0))
        want = tl.where(k < V, k, REACH)
        if ((k < V) | (p < 1.0)) & (want <= REACH) & (want <= groups):
            g = tl.arange(0, BLOCK_G)
            keys = _key(tl.load(maxima_ptr + row * groups + g, mask=g < groups, other=float("-inf")))
            keys = tl.where(g < groups, keys, -2147483648)
            lowest = tl.min(tl.where(g < groups, keys, 2147483647), 0)
            bound = _from_key(_select(keys, tl.full([BLOCK_G], 1, tl.int32), lowest, _key(top) + 1, want))
    tl.store(bounds_ptr + row * 3, bound)


@triton.jit
def _gather_kernel(
    logits_ptr, bounds_ptr, counts_ptr, gathered_ptr, V, stride_l, PIECE: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """Appends one piece's logits at or above the bound to the row's array, in any order, up to its capacity."""
    row = tl.program_id(0)
    bound = tl.load(bounds_ptr + row * 3)
    if bound < float("inf"):
        at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
        x = tl.load(logits_ptr + row.to(tl.int64) * stride_l + at, mask=at < V, other=float("-inf")).to(tl.float32)
        found = ((x >= bound) & (at < V)).to(tl.int32)
        n = tl.sum(found, 0)
        if n > 0:
            slot = tl.atomic_add(counts_ptr + row, n, sem="relaxed") + tl.cumsum(found, 0) - 1
            tl.store(gathered_ptr + row * CAPACITY + slot, x, mask=(found > 0) & (slot < CAPACITY))


@triton.jit
def _least_of_gathered(x_ptr, n, k, p, V, top, total, inverse, lowest, CAPACITY: tl.constexpr):
    """(key of the least kept logit, whether the n gathered logits suffice to find it)."""
    UNIT: tl.constexpr = 1099511627776.0  # 2^40: fixed point for masses of up to 2^20 tokens and more
    i = tl.arange(0, CAPACITY)
    x = tl.load(x_ptr + i, mask=i < n, other=float("-inf"))
    keys = tl.where(i < n, _key(x), -2147483648)
    mass = tl.where(i < n, tl.exp((x - top) * inverse) * UNIT, 0.0).to(tl.int64)
    high = _key(top) + 1
    low = lowest
    if k < V:
        low = _select(keys, tl.full([CAPACITY], 1, tl.int32), lowest, high, k)
    enough = True
    if p < 1.0:
        kept = tl.sum(tl.where(keys >= low, mass, 0), 0)
        want = (p * total * UNIT).to(tl.int64)
        if k < V:
            want = (p * kept.to(tl.float32)).to(tl.int64)
        want = tl.maximum(want, 1)
        enough = kept >= want
        if enough:
            low = _select(keys, mass, low, high, want)
    return low, enough


@triton.jit
def _least_of_row(row_ptr, k, p, V, top, inverse, lowest, BLOCK: tl.constexpr):
    """The key of the least kept logit, found by passes over the whole row."""
    high = _key(top) + 1
    low = lowest
    if k < V:
        low = _search(row_ptr, V, low, low, high, top, inverse, k, False, BLOCK)
    if p < 1.0:
        one = low + tl.zeros([1], tl.int32)
        _, kept = _scan(row_ptr, V, low, top, inverse, one, BLOCK, 1)
        low = _search(row_ptr, V, low, low, high, top, inverse, p * tl.sum(kept, 0), True, BLOCK)
    return low


@triton.jit
def _threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, bounds_ptr, counts_ptr, gathered_ptr, least_ptr, V,
    stride_l, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """The least logit that a row keeps, -inf if it filters nothing. One program a row."""
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    k, p, mp = _filters(row, top_k_ptr, top_p_ptr, min_p_ptr, V, TOP_K, TOP_P, MIN_P)
    least = float("-inf")
    if (temperature > 0) & ((k < V) | (p < 1.0) | (mp > 0.0)):
        inverse = 1.0 / temperature
        bound = tl.load(bounds_ptr + row * 3)
        top = tl.load(bounds_ptr + row * 3 + 1)
        total = tl.load(bounds_ptr + row * 3 + 2)
        lowest = _key(float("-inf") + tl.zeros_like(top))
        if (k < V) | (p < 1.0):
            n = tl.load(counts_ptr + row)
            told = False
            key = lowest
            if (bound < float("inf")) & (n <= CAPACITY):
                key, told = _least_of_gathered(
                    gathered_ptr + row * CAPACITY, n, k, p, V, top, total, inverse, lowest, CAPACITY
                )
            if not told:
                row_ptr = logits_ptr + row.to(tl.int64) * stride_l
                key = _least_of_row(row_ptr, k, p, V, top, inverse, lowest, BLOCK)
            least = _from_key(key)
        if mp > 0.0:
            # p_i >= mp * p_max in logits. The best token always stays.
            least = tl.maximum(least, tl.minimum(top + temperature * tl.log(mp), top))
    tl.store(least_ptr + row, least)


def thresholds(
    logits: Tensor, least: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> None:
    """least[r] = the least logit that row r's filters keep, -inf without filters; arguments as in `sample`."""
    rows, vocab = logits.shape
    pieces, groups = triton.cdiv(vocab, PIECE), triton.cdiv(vocab, GROUP)
    new = logits.new_empty
    maxima, sums = new(rows, groups, dtype=torch.float32), new(rows, pieces, 2, dtype=torch.float32)
    bounds, counts = new(rows, 3, dtype=torch.float32), new(rows, dtype=torch.int32)
    gathered = new(rows, CAPACITY, dtype=torch.float32)
    given = {"TOP_K": top_k is not None, "TOP_P": top_p is not None}
    _survey_kernel[(rows, pieces)](
        logits, temperature, maxima, sums, vocab, logits.stride(0), groups, pieces, GROUP=GROUP, PIECE=PIECE,
        num_warps=8,
    )  # fmt: skip
    _bound_kernel[(rows,)](
        temperature, top_k, top_p, maxima, sums, bounds, counts, vocab, groups, pieces, **given,
        BLOCK_G=triton.next_power_of_2(groups), BLOCK_P=triton.next_power_of_2(pieces), REACH=REACH, num_warps=4,
    )  # fmt: skip
    _gather_kernel[(rows, pieces)](
        logits, bounds, counts, gathered, vocab, logits.stride(0), PIECE=PIECE, CAPACITY=CAPACITY, num_warps=8
    )
    _threshold_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, bounds, counts, gathered, least, vocab, logits.stride(0), **given,
        MIN_P=min_p is not None, BLOCK=min(1024, triton.next_power_of_2(vocab)), CAPACITY=CAPACITY, num_warps=8,
    )  # fmt: skip


def kept_logits(logits, temperature, top_k=None, top_p=None, min_p=None):
    """What top-k, then top-p of what top-k left, then min-p keep: boolean [rows, vocab]. Ties at a threshold stay."""
    x = logits.double()
    keep = x > -math.inf
    vocab = x.shape[1]
    order = x.sort(1, descending=True).values
    warm = temperature.double().clamp_min(1e-30)[:, None]
    if top_k is not None:
        k = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).long()
        keep &= x >= order.gather(1, k[:, None] - 1)
    if top_p is not None:
        probs = torch.softmax((x / warm).masked_fill(~keep, -math.inf), 1)
        mass, index = probs.sort(1, descending=True)
        needed = ((mass.cumsum(1) - mass) < top_p.double()[:, None]).sum(1).clamp_min(1)
        least = x.gather(1, index.gather(1, needed[:, None] - 1))
        keep &= (x >= least) | (top_p >= 1)[:, None]
    if min_p is not None:
        keep &= x >= order[:, :1] + temperature.double()[:, None] * min_p.double().log()[:, None]
    return keep
