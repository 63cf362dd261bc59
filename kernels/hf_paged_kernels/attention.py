"""What the two attention ops share: the formula in plain torch, and checks of queries, options and block tables."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from . import checks
from .common import wide


def gather_pages(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """Tokens 0..length of one row as [length, heads, dim], through its block table [max_blocks]."""
    blocks = table[: -(-length // cache.shape[1])].long()
    if cache.element_size() == 1:  # indexing has no float8 kernels: move bytes
        return cache.view(torch.uint8)[blocks].flatten(0, 1)[:length].view(cache.dtype)
    return cache[blocks].flatten(0, 1)[:length]


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    x = wide(x)
    return x if scale is None else x * scale.to(x.dtype).view(-1, 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of one row in the dtype it is given: query [q, heads, dim], key and value [s, kv_heads, dim].

    Query i is at position s - q + i. Scores: scale, then soft-cap cap * tanh(x / cap), then ALiBi slope * (key
    position - query position), then the mask, then the softmax, in which a sink is one more logit, without a value.
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


def reference(
    query, key, value, out, query_start_loc, seq_lens, block_tables, scale, window, softcap, sinks, alibi_slopes,
    k_scale, v_scale,
):  # fmt: skip
    """Rows of any number of query tokens over block tables or contiguous keys; tokens after the last row get zeros."""
    starts = query_start_loc.tolist()
    out[starts[-1] :] = 0
    for row, (lo, hi) in enumerate(pairwise(starts)):
        if lo == hi:
            continue
        if block_tables is None:
            k, v = key[lo:hi], value[lo:hi]
        else:
            length = int(seq_lens[row])
            k, v = (gather_pages(cache, block_tables[row], length) for cache in (key, value))
        k, v = _scaled(k, k_scale), _scaled(v, v_scale)
        out[lo:hi] = attend(query[lo:hi].to(k.dtype), k, v, scale, window, softcap, sinks, alibi_slopes).to(out.dtype)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """Queries [tokens, heads, dim] and options against keys and values; returns `out` [tokens, heads, value dim]."""
    (kv_heads, dim), v_dim = key.shape[-2:], value.shape[-1]
    checks.dense("query", query, (None, None, dim), checks.FLOATS, key.device)
    tokens, heads, _ = query.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads; it must be a multiple of the {kv_heads} KV heads")
    if key.dtype not in (query.dtype, checks.FP8):
        raise TypeError(
            f"query has dtype {query.dtype}; it must be that of the keys, {key.dtype}, or they float8_e4m3fn"
        )
    for name, size in (("head dim", dim), ("value head dim", v_dim)):
        if not 1 <= size <= 256:
            raise ValueError(f"{name} is {size}; allowed are 1 to 256")
    if out is None:
        out = query.new_empty(tokens, heads, v_dim)
    checks.dense("out", out, (tokens, heads, v_dim), checks.FLOATS, query.device)
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if window < 0:
        raise ValueError(f"window is {window}; it must be positive, or 0 for none")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or 0 for none")
    for name, x in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if x is not None:
            checks.vector(name, x, heads, checks.FLOATS, query.device)
    checks.scales(key, k_scale, v_scale)
    return out


def check_tables(block_tables: Tensor, seq_lens: Tensor, rows: int, device: torch.device) -> None:
    """Block tables [rows, max blocks] and lengths [rows], both int32."""
    checks.dense("block_tables", block_tables, (rows, None), (torch.int32,), device)
    checks.vector("seq_lens", seq_lens, rows, (torch.int32,), device)


def check_table_values(block_tables: Tensor, seq_lens: Tensor, k_cache: Tensor) -> None:
    """Debug only, since it waits for the device: every block within a row's length exists."""
    blocks, page = k_cache.shape[:2]
    longest = block_tables.shape[1] * page
    for row, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= longest:
            raise ValueError(f"seq_lens[{row}] is {length}; allowed are 0 to {longest}, what block_tables hold")
        for column, block in enumerate(block_tables[row, : -(-length // page)].tolist()):
            if not 0 <= block < blocks:
                raise ValueError(f"block_tables[{row}, {column}] is {block}; allowed are 0 to {blocks - 1}")
