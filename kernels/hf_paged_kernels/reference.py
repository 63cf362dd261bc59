"""What every kernel computes, in plain torch: the specification. Slow, in loops where that is clearer, and exact.

All work in float64 where the input is float64, else in float32, and round once at the end, unless a docstring says
more. Arguments are those of the functions of the same names in `api.py`.
"""

import math
from itertools import pairwise

import torch


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gather_pages(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens 0..length of one row as [length, heads, dim], through its block table [max_blocks]."""
    page = cache.shape[1]
    blocks = table[: -(-length // page)].long() if length else table[:0].long()
    if cache.element_size() == 1:  # indexing has no float8 kernels: move bytes
        return cache.view(torch.uint8)[blocks].flatten(0, 1)[:length].view(cache.dtype)
    return cache[blocks].flatten(0, 1)[:length]


def _scaled(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    wide = x.float() if x.element_size() == 1 else _wide(x)
    return wide if scale is None else wide * scale.to(wide.dtype).view(-1, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one row in the dtype it is given: query [q, heads, dim], key and value [s, kv_heads, dim].

    Query i sits at position s - q + i. Scores: scale, then soft-cap cap * tanh(x / cap), then ALiBi slope * (key
    position - query position), then the mask, then the softmax, which a sink joins with one logit that has no value.
    A query that sees no key gives zeros.
    """
    q_len, heads, _ = query.shape
    s = key.shape[0]
    group = heads // key.shape[1]
    k = key.repeat_interleave(group, 1)
    v = value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    q_pos = torch.arange(s - q_len, s, device=query.device)[:, None]
    k_pos = torch.arange(s, device=query.device)[None, :]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(scores.dtype)[:, None, None] * (k_pos - q_pos)
    seen = k_pos <= q_pos
    if window > 0:
        seen = seen & (q_pos - k_pos < window)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(heads, q_len, 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :s]
    return torch.einsum("hqk,khd->qhd", weights, v)


def decode_attention(
    query, k_cache, v_cache, block_tables, seq_lens, out, *, scale, window=0, softcap=0.0, sinks=None,
    alibi_slopes=None, k_scale=None, v_scale=None,
):  # fmt: skip
    """One query token a row; see `attend`."""
    for row, length in enumerate(seq_lens.tolist()):
        if not length:
            out[row] = 0
            continue
        k = _scaled(gather_pages(k_cache, block_tables[row], length), k_scale)
        v = _scaled(gather_pages(v_cache, block_tables[row], length), v_scale)
        q = query[row : row + 1].to(k.dtype)
        out[row] = attend(q, k, v, scale, window, softcap, sinks, alibi_slopes)[0].to(out.dtype)


def prefill_attention(
    query, key, value, out, query_start_loc, *, seq_lens=None, block_tables=None, scale, window=0, softcap=0.0,
    sinks=None, alibi_slopes=None, k_scale=None, v_scale=None,
):  # fmt: skip
    """Rows of many query tokens over block tables, or over contiguous keys; tokens behind the last row get zeros."""
    starts = query_start_loc.tolist()
    out[starts[-1] :] = 0
    for row, (lo, hi) in enumerate(pairwise(starts)):
        if lo == hi:
            continue
        if block_tables is None:
            k, v = key[lo:hi], value[lo:hi]
        else:
            length = int(seq_lens[row])
            k = gather_pages(key, block_tables[row], length)
            v = gather_pages(value, block_tables[row], length)
        k, v = _scaled(k, k_scale), _scaled(v, v_scale)
        out[lo:hi] = attend(query[lo:hi].to(k.dtype), k, v, scale, window, softcap, sinks, alibi_slopes).to(out.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, dim] by cos, sin [tokens, rotary / 2], in float32, rounded once."""
    half = cos.shape[1]
    y = _wide(x).clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = _wide(x)[..., first], _wide(x)[..., second]
    c, s = cos.to(y.dtype)[:, None], sin.to(y.dtype)[:, None]
    y[..., first] = a * c - b * s
    y[..., second] = b * c + a * s
    return y


def _store(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None) -> None:
    if scale is not None:
        x = (x.float() / scale.float().view(-1, 1)).clamp(-448, 448)
    keep = slots >= 0
    page = cache.shape[1]
    where = (slots[keep] // page, slots[keep] % page)
    if cache.element_size() == 1:
        cache.view(torch.uint8)[where] = x[keep].to(cache.dtype).view(torch.uint8)
    else:
        cache[where] = x[keep].to(cache.dtype)


def write_cache(
    key, value, k_cache, v_cache, slot_mapping, *, query=None, cos=None, sin=None, query_out=None, key_out=None,
    interleaved=False, k_scale=None, v_scale=None,
):  # fmt: skip
    """Rotates query and key where cos and sin are given, and stores key and value at their slots."""
    rotated = key
    if cos is not None:
        rotated = rotate(key, cos, sin, interleaved)
        if query is not None:
            query_out.copy_(rotate(query, cos, sin, interleaved))
    _store(rotated, k_cache, slot_mapping, k_scale)
    _store(value, v_cache, slot_mapping, v_scale)
    if key_out is not None and cos is not None:
        key_out.copy_(rotated)


def copy_blocks(caches, pairs):
    """Copies block `source` to block `target` in every cache, for each (source, target) without a negative number."""
    pairs = pairs[(pairs >= 0).all(1)]
    for cache in caches:
        raw = cache.view(torch.uint8) if cache.element_size() == 1 else cache
        raw[pairs[:, 1]] = raw[pairs[:, 0]]


def rms_norm(x, weight, out, *, residual=None, eps=1e-6, gemma=False):
    """Gives x / sqrt(mean(x^2) + eps), rounded to out's dtype and then times weight, or (Gemma) times 1 + weight."""
    if residual is not None:
        residual.copy_(_wide(x) + _wide(residual))
        x = residual
    x = _wide(x)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (1 + weight.to(y.dtype)) if gemma else y.to(out.dtype).to(y.dtype) * weight.to(y.dtype)
    out.copy_(y)


def activate(g, kind):
    """The activation `kind` of g, in g's dtype."""
    functional = torch.nn.functional
    if kind == "silu":
        return functional.silu(g)
    return functional.gelu(g, approximate="tanh" if kind == "gelu_tanh" else "none")


def gated_activation(gate, up, out, *, kind="silu"):
    """act(gate) rounded to out's dtype, times up."""
    g = _wide(gate)
    out.copy_(activate(g, kind).to(out.dtype).to(g.dtype) * _wide(up))


def linear(
    x, weight, out, *, bias=None, norm_weight=None, eps=0.0, gemma=False, residual=None, gate=None
):  # fmt: skip
    """Gives x W^T + bias of x, or of its `rms_norm` (rounded to x's dtype); then act(gate) * up; then + residual."""
    if norm_weight is not None:
        normed = torch.empty_like(x)
        rms_norm(x, norm_weight, normed, eps=eps, gemma=gemma)
        x = normed
    y = _wide(x) @ _wide(weight).T
    if bias is not None:
        y = y + bias.to(y.dtype)
    if gate is not None:
        g, up = y.chunk(2, -1)
        y = activate(g, gate) * up
    if residual is not None:
        y = y + residual.to(y.dtype)
    out.copy_(y)


def argmax(logits, out):
    """The first index of each row's largest logit."""
    top = logits.max(1, keepdim=True).values
    out.copy_((logits == top).int().argmax(1))


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


def kept_logits(logits, temperature, top_k=None, top_p=None, min_p=None):
    """What top-k, then top-p of what top-k left, then min-p keep: boolean [rows, vocab]. Equals of a threshold stay."""
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


def sample(logits, out, *, temperature, seeds, positions, top_k=None, top_p=None, min_p=None):
    """Argmax over kept tokens of logit / temperature + Gumbel noise; rows of temperature 0 take the argmax."""
    keep = kept_logits(logits, temperature, top_k, top_p, min_p)
    hot = (temperature > 0)[:, None]
    warm = torch.where(hot, temperature[:, None].double(), 1.0)
    noisy = logits.double() / warm + torch.where(hot, gumbel(seeds, positions, logits.shape[1]), 0.0)
    argmax(torch.where(keep | ~hot, noisy, -math.inf), out)
