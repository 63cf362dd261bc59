"""Variable-length causal attention over block tables or contiguous keys: prefill, chunks over a prefix, mixed batches.

One program takes `block_m` rows of packed (token, query head) pairs that share a KV head, so that a decode row among
prefill rows reads its keys once for all its heads. Tiles of keys that every query of the program sees are attended
without a mask; only those at the causal diagonal or a window's edge are masked (FlashAttention-2, Dao, 2023).
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import attention, checks
from .common import dot
from .heuristics import invariant_prefill_config, prefill_config
from .op import op

try:
    from . import hopper
except ImportError:  # Triton has no Gluon, or an incompatible one: the portable kernel serves all calls
    hopper = None

PAGED, CONTIGUOUS, DESCRIPTOR = 0, 1, 2  # where a program's keys come from


@triton.jit
def _attend(
    acc, l, m, q, k_src, v_src, table, lo, hi, q_pos, kv_len, kv_start, head, scale2, softcap, window, slope,
    stride_kb, stride_kt, stride_vb, stride_vt, n, d, dv,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, SOURCE: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):  # fmt: skip
    """Online-softmax steps over keys lo..hi (a multiple of BLOCK_N from 0); returns the new (acc, l, m).

    Without MASKED, every query row must see every key in the range.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    for t in tl.range(lo, hi, BLOCK_N):
        pos = t + n
        if SOURCE == 2:
            k = k_src.load([kv_start + t, head * DIM])
        else:
            if SOURCE == 0:
                if MASKED:
                    page = tl.load(table + pos // PAGE, mask=pos < kv_len, other=0).to(tl.int64)
                else:
                    page = tl.load(table + pos // PAGE).to(tl.int64)
                k_row = page * stride_kb + (pos % PAGE) * stride_kt
                v_row = page * stride_vb + (pos % PAGE) * stride_vt
            else:
                token = (kv_start + pos).to(tl.int64)
                k_row = token * stride_kt
                v_row = token * stride_vt
            if MASKED:
                k_ok = (pos < kv_len)[:, None] & (d < DIM)[None, :]
                k = tl.load(k_src + k_row[:, None] + d[None, :], mask=k_ok, other=0.0)
            elif DIM == BLOCK_D:
                k = tl.load(k_src + k_row[:, None] + d[None, :])
            else:
                k = tl.load(k_src + k_row[:, None] + d[None, :], mask=(d < DIM)[None, :], other=0.0)
        x = dot(q, tl.trans(k.to(q.dtype)))
        if SOFTCAP:
            y = tl.exp2(x * (scale2 * 2.0 / softcap))
            x = softcap * LOG2E * (1.0 - 2.0 / (1.0 + y))
        if ALIBI:
            if not SOFTCAP:
                x = x * scale2
            x += slope[:, None] * (pos[None, :] - q_pos[:, None]).to(tl.float32)
        factor = 1.0 if SOFTCAP or ALIBI else scale2
        if MASKED:
            seen = (pos[None, :] <= q_pos[:, None]) & (pos < kv_len)[None, :]
            if WINDOW:
                seen = seen & (q_pos[:, None] - pos[None, :] < window)
            x = tl.where(seen, x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1) * factor)
        p = tl.exp2(x * factor - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        if SOURCE == 2:
            v = v_src.load([kv_start + t, head * V_DIM])
        elif MASKED:
            v_ok = (pos < kv_len)[:, None] & (dv < V_DIM)[None, :]
            v = tl.load(v_src + v_row[:, None] + dv[None, :], mask=v_ok, other=0.0)
        elif V_DIM == BLOCK_V:
            v = tl.load(v_src + v_row[:, None] + dv[None, :])
        else:
            v = tl.load(v_src + v_row[:, None] + dv[None, :], mask=(dv < V_DIM)[None, :], other=0.0)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        acc = dot(p.to(q.dtype), v.to(q.dtype), acc)
        m = m_new
    return acc, l, m


# Sizes that change from step to step are not specialized: Triton compiles no variant for 1 or for multiples of 16.
@triton.jit(do_not_specialize=["tokens", "rows", "window"])
def _prefill_kernel(
    q_ptr, k_src, v_src, out_ptr, table_ptr, starts_ptr, lens_ptr, sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr,
    scale, softcap, window, tokens, rows, HK,
    stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ot, stride_oh, stride_tr, stride_ks, stride_vs,
    GROUP: tl.constexpr, HEADS_M: tl.constexpr, HEAD_BLOCKS: tl.constexpr, TOKENS_M: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, SOURCE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    INVARIANT: tl.constexpr,
):  # fmt: skip
    """TOKENS_M query tokens of one row, times HEADS_M heads of one KV head, against all keys they see.

    Row r has the programs from starts[r] // TOKENS_M + r on: at least as many as it needs, found without a plan. The
    tokens after the last row count as one more row, without keys, so that padding tokens get zeros.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = program % (HK * HEAD_BLOCKS) // HEAD_BLOCKS
    part = program % HEAD_BLOCKS
    tile = program // (HK * HEAD_BLOCKS)  # from the end: a row's last tokens see the most keys, so they start first
    i = tl.arange(0, BLOCK_ROWS)
    begins = tl.load(starts_ptr + i, mask=i <= rows, other=0)
    row = tl.sum(((begins // TOKENS_M + i <= tile) & (i <= rows)).to(tl.int32), 0) - 1
    q_start = tl.load(starts_ptr + row)
    q_stop = tokens
    kv_len = 0
    if row < rows:
        q_stop = tl.load(starts_ptr + row + 1)
        if SOURCE == 0:
            kv_len = tl.load(lens_ptr + row)
        else:
            kv_len = q_stop - q_start
    index = (tile - (q_start // TOKENS_M + row)) * TOKENS_M
    if index >= q_stop - q_start:
        return
    q_len = q_stop - q_start
    r = tl.arange(0, BLOCK_M)
    local = index + r // HEADS_M
    lane = part * HEADS_M + r % HEADS_M
    q_head = head * GROUP + lane
    real = (local < q_len) & (r // HEADS_M < TOKENS_M) & (lane < GROUP)
    q_pos = kv_len - q_len + local
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    n = tl.arange(0, BLOCK_N)
    token = (q_start + local).to(tl.int64)
    q_at = q_ptr + token[:, None] * stride_qt + q_head[:, None] * stride_qh + d[None, :]
    q = tl.load(q_at, mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    scale2 = scale * LOG2E
    if SCALED:
        scale2 = scale2 * tl.load(k_scale_ptr + head * stride_ks)
    m = tl.full([BLOCK_M], -1.0e30, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        m = tl.load(sinks_ptr + q_head, mask=real, other=0.0).to(tl.float32) * LOG2E
        l = tl.full([BLOCK_M], 1.0, tl.float32)
    slope = m
    if ALIBI:
        slope = tl.load(slopes_ptr + q_head, mask=real, other=0.0).to(tl.float32) * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    # Keys lo..hi are seen by some query of this program, keys edge..full by all of them.
    first_pos = kv_len - q_len + index
    last_pos = kv_len - q_len + tl.minimum(index + TOKENS_M, q_len) - 1
    hi = tl.minimum(last_pos + 1, kv_len)
    lo = 0
    edge = 0
    full = tl.maximum(tl.minimum(first_pos + 1, kv_len), 0) // BLOCK_N * BLOCK_N
    if WINDOW:
        lo = tl.maximum(first_pos - window + 1, 0) // BLOCK_N * BLOCK_N
        edge = tl.cdiv(tl.maximum(last_pos - window + 1, 0), BLOCK_N) * BLOCK_N
        full = tl.maximum(full, lo)
        edge = tl.minimum(edge, full)
    if INVARIANT:
        # All keys go through the last loop, since the loops round differently and neighbours would decide between them.
        edge = lo
        full = lo
    kv_start = q_start
    table = table_ptr + row.to(tl.int64) * stride_tr
    k_from = k_src
    v_from = v_src
    if SOURCE != 2:
        k_from = k_src + head.to(tl.int64) * stride_kh
        v_from = v_src + head.to(tl.int64) * stride_vh
    if WINDOW:
        acc, l, m = _attend(
            acc, l, m, q, k_from, v_from, table, lo, edge, q_pos, kv_len, kv_start, head, scale2, softcap, window,
            slope, stride_kb, stride_kt, stride_vb, stride_vt, n, d, dv, DIM, BLOCK_D, V_DIM, BLOCK_V, PAGE, BLOCK_N,
            SOURCE, True, WINDOW, SOFTCAP, ALIBI,
        )  # fmt: skip
    acc, l, m = _attend(
        acc, l, m, q, k_from, v_from, table, edge, full, q_pos, kv_len, kv_start, head, scale2, softcap, window,
        slope, stride_kb, stride_kt, stride_vb, stride_vt, n, d, dv, DIM, BLOCK_D, V_DIM, BLOCK_V, PAGE, BLOCK_N,
        SOURCE, False, WINDOW, SOFTCAP, ALIBI,
    )  # fmt: skip
    acc, l, m = _attend(
        acc, l, m, q, k_from, v_from, table, full, hi, q_pos, kv_len, kv_start, head, scale2, softcap, window,
        slope, stride_kb, stride_kt, stride_vb, stride_vt, n, d, dv, DIM, BLOCK_D, V_DIM, BLOCK_V, PAGE, BLOCK_N,
        SOURCE, True, WINDOW, SOFTCAP, ALIBI,
    )  # fmt: skip
    norm = 1.0 / tl.where(l > 0, l, 1.0)
    if SCALED:
        norm = norm * tl.load(v_scale_ptr + head * stride_vs)
    acc = acc * norm[:, None]
    out_at = out_ptr + token[:, None] * stride_ot + q_head[:, None] * stride_oh + dv[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (dv < V_DIM)[None, :])


def descriptor_ready(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the tensor-copy engine can read contiguous keys and values: Hopper or later, whole power-of-two heads.

    The engine wants 16-byte aligned bases and row strides; heads must lie side by side to form one 2-D matrix.
    """
    if key.device.type != "cuda" or torch.cuda.get_device_capability(key.device)[0] < 9:
        return False
    for x in (key, value):
        dim = x.shape[2]
        whole = dim >= 16 and dim & (dim - 1) == 0 and (x.stride(1) == dim or x.shape[1] == 1)
        if not whole or x.element_size() != 2 or x.stride(0) % 8 or x.data_ptr() % 16:
            return False
    return True


def _descriptor(x: Tensor, block_n: int) -> TensorDescriptor:
    """A 2-D descriptor of x [tokens, heads, dim] that loads `block_n` tokens of one head."""
    tokens, heads, dim = x.shape
    return TensorDescriptor(x, [tokens, heads * dim], [x.stride(0), 1], [block_n, dim])


def _launch(
    query, key, value, query_start_loc, scale, seq_lens, block_tables, out, window, softcap, sinks, alibi_slopes,
    k_scale, v_scale, invariant,
):  # fmt: skip
    """Launches the kernel, or that of `hopper` where it serves the call."""
    tokens, heads, dim = query.shape
    rows = query_start_loc.shape[0] - 1
    if not tokens:
        return
    kv_heads, v_dim = value.shape[-2:]
    scaled, paged = k_scale is not None, block_tables is not None
    plain = not window and not softcap and not scaled and not invariant and sinks is None and alibi_slopes is None
    if plain and hopper is not None and hopper.supports(query, key, value, rows):
        hopper.launch(query, key, value, out, query_start_loc, seq_lens, block_tables, scale)
        return
    source = PAGED if paged else DESCRIPTOR if descriptor_ready(key, value) else CONTIGUOUS
    if invariant:
        config = invariant_prefill_config(dim, v_dim, query.element_size(), query.device)
    else:
        config = prefill_config(dim, v_dim, query.element_size(), source, query.device)
    group = heads // kv_heads
    heads_m = min(group, config.block_m)
    head_blocks = triton.cdiv(group, heads_m)
    tokens_m = config.block_m // heads_m
    k_src, v_src = (_descriptor(x, config.block_n) if source == DESCRIPTOR else x for x in (key, value))
    _prefill_kernel[(kv_heads * head_blocks * (tokens // tokens_m + rows + 1),)](
        query, k_src, v_src, out, block_tables if paged else query_start_loc, query_start_loc,
        seq_lens if paged else query_start_loc, sinks, alibi_slopes, k_scale, v_scale,
        scale, softcap, window, tokens, rows, kv_heads,
        query.stride(0), query.stride(1),
        key.stride(0) if paged else 0, key.stride(-3), key.stride(-2),
        value.stride(0) if paged else 0, value.stride(-3), value.stride(-2),
        out.stride(0), out.stride(1), block_tables.stride(0) if paged else 0,
        1 if scaled and k_scale.numel() > 1 else 0, 1 if scaled and v_scale.numel() > 1 else 0,
        GROUP=group, HEADS_M=heads_m, HEAD_BLOCKS=head_blocks, TOKENS_M=tokens_m,
        DIM=dim, BLOCK_D=triton.next_power_of_2(max(dim, 16)), V_DIM=v_dim,
        BLOCK_V=triton.next_power_of_2(max(v_dim, 16)), PAGE=key.shape[1] if paged else 1,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_ROWS=triton.next_power_of_2(max(rows + 1, 16)),
        SOURCE=source, WINDOW=window > 0, SOFTCAP=softcap > 0, SINKS=sinks is not None,
        ALIBI=alibi_slopes is not None, SCALED=scaled, INVARIANT=invariant,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@op(_launch, attention.reference, writes=("out",))
def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    seq_lens: Tensor | None = None,
    block_tables: Tensor | None = None,
    out: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    invariant: bool = False,
    impl: str = "triton",
    debug: bool = False,
) -> Tensor:
    """Causal attention of rows of any number of query tokens; returns `out` [tokens, heads, value dim].

    query [tokens, heads, dim]; row r has tokens query_start_loc[r] to query_start_loc[r + 1] (int32 [rows + 1]). With
    block_tables int32 [rows, max blocks] and seq_lens int32 [rows], key and value are paged caches as in
    `decode_attention`, and query i of q is at position seq_lens[r] - q + i: a prefill, a chunk over a prefix, or a
    decode row. Without, key and value are [tokens, kv heads, dim] like the query, and rows have no prefix. The grid
    depends on shapes alone, so that a captured graph serves any batch of its size. Tokens after the last row, and rows
    of length 0, give zeros. `invariant`, of paged calls: a token's result has the same bits whatever else is in the
    batch, and whether its row has one query or more.
    """
    device = query.device
    paged = block_tables is not None
    if paged != (seq_lens is not None):
        raise ValueError("seq_lens and block_tables belong together: give both (paged) or neither (contiguous)")
    checks.vector("query_start_loc", query_start_loc, None, (torch.int32,), device)
    if invariant and not paged:
        raise ValueError("invariant=True needs block_tables: contiguous keys are added up in another order")
    if query_start_loc.shape[0] < 1:
        raise ValueError("query_start_loc is empty; it must hold rows + 1 numbers")
    if paged:
        checks.caches(key, value, device)
        attention.check_tables(block_tables, seq_lens, query_start_loc.shape[0] - 1, device)
    else:
        checks.dense("key", key, (query.shape[0], None, None), checks.FLOATS, device)
        checks.dense("value", value, (*key.shape[:2], None), (key.dtype,), device)
    out = attention.check(query, key, value, out, scale, window, softcap, sinks, alibi_slopes, k_scale, v_scale)
    if debug:
        _check_starts(query_start_loc, seq_lens, query.shape[0])
        if paged:
            attention.check_table_values(block_tables, seq_lens, key)
    return out


def _check_starts(query_start_loc: Tensor, seq_lens: Tensor | None, tokens: int) -> None:
    """Debug only, since it waits for the device: rows follow each other from 0 and end within the tokens.

    None has more query tokens than its sequence has tokens.
    """
    starts = query_start_loc.tolist()
    if starts[0] != 0 or starts != sorted(starts) or starts[-1] > tokens:
        raise ValueError(f"query_start_loc is {starts}; it must rise from 0 to at most the {tokens} tokens")
    lens = [b - a for a, b in pairwise(starts)]
    for row, (query, length) in enumerate(zip(lens, lens if seq_lens is None else seq_lens.tolist(), strict=True)):
        if query > length > 0:
            raise ValueError(f"seq_lens[{row}] is {length}; it must be at least the row's {query} query tokens, or 0")
