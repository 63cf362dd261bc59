"""Sampling without sorting and without a host sync: temperature, top-k, top-p and min-p, a value of each per row.

Top-k and top-p are thresholds on the logit, found by bisection on sortable integer keys. `_survey` reduces the
vocabulary to maxima of groups; the m-th largest of these bounds the m-th largest logit from below (`_bound`), so that
`_gather` can put all logits that may matter into a small array, on which `_threshold` is quick. Where that array
doesn't hold enough of the mass (a flat distribution under top-p, or k over 1,024) it searches the whole row instead:
slow, and as exact.
`_pick` then takes, over pieces of the vocabulary, the best of logit / temperature + Gumbel noise, which draws from the
softmax (Gumbel, 1954), or without temperature the best logit; `_choose` takes the best of the pieces.

Noise comes from Philox-4x32-10 (Salmon et al., 2011) with counter (token id, position) and key seed, so that a draw
depends on the request's own seed, position and logits, and on nothing else in its batch. For the same reason masses of
gathered logits, whose order varies, are summed in 64-bit fixed point.
"""

import torch
import triton
import triton.language as tl

from .common import await_previous, overlap
from .heuristics import sampling_config

GROUP = 64  # logits to a maximum
PIECE = 4096  # logits to a program; independent of the batch, for the mass's rounding depends on it
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
    """For each pivot key: how many kept logits (key >= lowest) have a key not under it, and their exp-mass."""
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
    """The largest key such that the logits at or above it number `want`, or hold an exp-mass of `want`, at least.

    Keeps: low's logits are enough, high's are not. It ends when at most one logit lies between, or no key does.
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
    """The largest key in [low, high) such that the weights of keys not under it sum to `want` at least; low's do."""
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
    """Appends one piece's logits from the bound on to the row's array, in any order, as far as it reaches."""
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
    """(key of the least kept logit, whether the n gathered ones suffice to tell)."""
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
    """The key of the least kept logit, by passes over the whole row."""
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
    """The least logit that a row keeps, -inf where it filters nothing. One program a row."""
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


@triton.jit
def _gumbel(seed, token, position):
    """Standard Gumbel noise from 32 random bits: -log(E), E = -log(1 - u), exact for small u, which decide."""
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
    """The best token of one piece of one row's vocabulary, the first of equals."""
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


def thresholds(
    logits: torch.Tensor,
    least: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> None:
    """least[r] = the least logit that row r's filters keep, -inf without filters; see `sample`."""
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


def argmax(logits: torch.Tensor, out: torch.Tensor) -> None:
    """out[r] = the first index of the largest logits[r, :]."""
    if logits.shape[0]:
        _best(logits, None, None, None, None, out)


def sample(
    logits: torch.Tensor,
    out: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> None:
    """out[r] = a draw from the filtered softmax of logits[r] / temperature[r], or the argmax at temperature 0."""
    rows = logits.shape[0]
    if not rows:
        return
    least = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if top_k is None and top_p is None and min_p is None:
        least.fill_(float("-inf"))
    else:
        thresholds(logits, least, temperature, top_k, top_p, min_p)
    _best(logits, temperature, least, seeds, positions, out)
