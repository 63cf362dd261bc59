"""Paged decode attention: one query token a row, split over the KV length, merged by the last program to finish.

The method is flash-decoding (Dao et al., 2023): every program reads one stretch of a row's keys and values for one KV
head, keeps a running maximum and sum (online softmax, Milakov & Gimelshein, 2018), and partial results are merged by
their log-sum-exp. Two things differ from the usual form, both for captured graphs:

- the stretches are chosen on the device by `plan_decode`, once a step, so that any mix of lengths fills the GPU evenly
  although the grid was fixed at capture;
- the merge needs no second launch: programs of one (row, head) count themselves, and the last one merges.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention, checks
from .common import admit_next, await_previous, dot, overlap
from .heuristics import DecodePlanShape, decode_config, decode_plan_shape
from .op import op

PLAN_FIELDS = 8  # row, start, stop, first work item of the row, work items of the row, sequence length, 2 spare
_ALIGN = 256  # bytes; keeps every region of the workspace vector-loadable


# Sizes that change from step to step are not specialized: Triton compiles no variant for 1 or for multiples of 16.
@triton.jit(do_not_specialize=["rows", "window", "target", "min_chunk", "capacity"])
def _plan_kernel(
    seq_lens_ptr, plan_ptr, rows, window, target, min_chunk, capacity,
    BLOCK_ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_WORK: tl.constexpr,
):  # fmt: skip
    """Program r cuts row r's visible keys into near-equal work items; see `_plan`."""
    r = tl.program_id(0)
    i = tl.arange(0, BLOCK_ROWS)
    length = tl.load(seq_lens_ptr + i, mask=i < rows, other=0)
    low = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    span = length - low
    total = tl.sum(span.to(tl.int64), 0)
    chunk = tl.maximum(min_chunk, tl.cdiv(total, target))
    chunk = (tl.cdiv(chunk, TILE) * TILE).to(tl.int32)
    items = tl.maximum(tl.cdiv(span, chunk), 1)
    share = tl.maximum(tl.cdiv(tl.cdiv(span, items), TILE) * TILE, TILE)
    items = tl.maximum(tl.cdiv(span, share), 1)
    first = tl.sum(tl.where(i < r, items, 0), 0)
    mine = tl.sum(tl.where(i == r, items, 0), 0)
    my_low = tl.sum(tl.where(i == r, low, 0), 0)
    my_len = tl.sum(tl.where(i == r, length, 0), 0)
    my_share = tl.sum(tl.where(i == r, share, 0), 0)
    for s in range(0, mine, BLOCK_WORK):
        j = s + tl.arange(0, BLOCK_WORK)
        ok = j < mine
        entry = plan_ptr + (first + j) * 8
        start = my_low + j * my_share
        tl.store(entry, tl.zeros_like(j) + r, mask=ok)
        tl.store(entry + 1, start, mask=ok)
        tl.store(entry + 2, tl.minimum(start + my_share, my_len), mask=ok)
        tl.store(entry + 3, tl.zeros_like(j) + first, mask=ok)
        tl.store(entry + 4, tl.zeros_like(j) + mine, mask=ok)
        tl.store(entry + 5, tl.zeros_like(j) + my_len, mask=ok)
    if r == rows - 1:
        # The rest of the fixed grid has no work.
        for s in range(first + mine, capacity, BLOCK_WORK):
            j = s + tl.arange(0, BLOCK_WORK)
            tl.store(plan_ptr + j * 8, tl.full([BLOCK_WORK], -1, tl.int32), mask=j < capacity)


@triton.jit
def _merge(
    out_ptr, lse_ptr, partial_ptr, first, items, head, HQ, stride_oh,
    GROUP: tl.constexpr, BLOCK_MG: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Adds the partial outputs of one (row, KV head), weighted by their log-sum-exp, and writes the result.

    `.cg` loads bypass L1, which may hold lines from before the other programs wrote.
    """
    g = tl.arange(0, BLOCK_MG)
    dv = tl.arange(0, BLOCK_V)
    real = g < GROUP
    top = tl.full([BLOCK_MG], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_MG], tl.float32)
    acc = tl.zeros([BLOCK_MG, BLOCK_V], tl.float32)
    # Only the row's base is 64-bit: 64-bit offsets of a whole tile of partial outputs would take too many registers.
    base = first * HQ + head * GROUP
    lse_row = lse_ptr + base
    partial_row = partial_ptr + base.to(tl.int64) * V_DIM
    for s in range(0, items, BLOCK_S):
        j = s + tl.arange(0, BLOCK_S)
        ok = (j < items)[:, None] & real[None, :]
        at = j[:, None] * HQ + g[None, :]
        # Both loads are issued before either result is used: most of the merge is the wait for them.
        lse = tl.load(lse_row + at, mask=ok, other=-1.0e30, cache_modifier=".cg")
        part = tl.load(
            partial_row + at[:, :, None] * V_DIM + dv[None, None, :],
            mask=ok[:, :, None] & (dv < V_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        fade = tl.exp2(top - new_top)
        weight = tl.where(ok, tl.exp2(lse - new_top[None, :]), 0.0)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], 0)
        top = new_top
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    at_out = out_ptr + (head * GROUP + g)[:, None] * stride_oh + dv[None, :]
    tl.store(at_out, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (dv < V_DIM)[None, :])


@triton.jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, plan_ptr, counter_ptr, lse_ptr, partial_ptr,
    sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, scale, softcap, HQ, HK,
    stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ot, stride_oh, stride_tr, stride_ks, stride_vs,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_MG: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, BLOCK_S: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, SCALED: tl.constexpr,
    PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One work item of one KV head: the GROUP query heads that share it against keys start..stop of one row."""
    LOG2E: tl.constexpr = 1.4426950408889634
    await_previous(PDL and EARLY)
    head = tl.program_id(0)
    entry = plan_ptr + tl.program_id(1) * 8
    row = tl.load(entry)
    if row < 0:
        return
    start = tl.load(entry + 1)
    stop = tl.load(entry + 2)
    first = tl.load(entry + 3)
    items = tl.load(entry + 4)
    length = tl.load(entry + 5)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    n = tl.arange(0, TILE)
    real = g < GROUP
    q_head = head * GROUP + g
    q_at = q_ptr + row.to(tl.int64) * stride_qt + q_head[:, None] * stride_qh + d[None, :]
    q = tl.load(q_at, mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    scale2 = scale * LOG2E
    if SCALED:
        scale2 = scale2 * tl.load(k_scale_ptr + head * stride_ks)
    if ALIBI:
        slope = tl.load(slopes_ptr + q_head, mask=real, other=0.0).to(tl.float32) * LOG2E
    m = tl.full([BLOCK_G], -1.0e30, tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    if SINKS:  # noqa: SIM102  a constexpr prunes only as an `if` of its own
        # A sink is one more logit without a value; the row's first work item includes it.
        if tl.program_id(1) == first:
            m = tl.load(sinks_ptr + q_head, mask=real, other=0.0).to(tl.float32) * LOG2E
            l = tl.full([BLOCK_G], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    table = table_ptr + row.to(tl.int64) * stride_tr
    k_head = k_ptr + head.to(tl.int64) * stride_kh
    v_head = v_ptr + head.to(tl.int64) * stride_vh
    for t in range(start, stop, TILE):
        pos = t + n
        ok = pos < stop
        page = tl.load(table + pos // PAGE, mask=ok, other=0).to(tl.int64)
        inner = pos % PAGE
        k_at = k_head + (page * stride_kb + inner * stride_kt)[:, None] + d[None, :]
        v_at = v_head + (page * stride_vb + inner * stride_vt)[:, None] + dv[None, :]
        if DIM == BLOCK_D:
            k = tl.load(k_at, mask=ok[:, None], other=0.0)
        else:
            k = tl.load(k_at, mask=ok[:, None] & (d < DIM)[None, :], other=0.0)
        x = dot(q, tl.trans(k.to(q.dtype))) * scale2
        if SOFTCAP:
            y = x * (2.0 / softcap)  # tanh(z) = 1 - 2 / (1 + exp(2 z)); x carries log2(e), so exp2 takes 2 z log2(e)
            x = softcap * LOG2E * (1.0 - 2.0 / (1.0 + tl.exp2(y)))
        if ALIBI:
            x += slope[:, None] * (pos - (length - 1))[None, :].to(tl.float32)
        x = tl.where(ok[None, :], x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(x - m_new[:, None])
        if V_DIM == BLOCK_V:
            v = tl.load(v_at, mask=ok[:, None], other=0.0)
        else:
            v = tl.load(v_at, mask=ok[:, None] & (dv < V_DIM)[None, :], other=0.0)
        v = v.to(q.dtype)
        l = l * alpha + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
    admit_next(PDL and not EARLY)
    safe = tl.where(l > 0, l, 1.0)
    acc = acc / safe[:, None]
    if SCALED:
        acc = acc * tl.load(v_scale_ptr + head * stride_vs)
    out_row = out_ptr + row.to(tl.int64) * stride_ot
    stored = real[:, None] & (dv < V_DIM)[None, :]
    if items == 1:
        tl.store(out_row + q_head[:, None] * stride_oh + dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        at = tl.program_id(1) * HQ + q_head
        tl.store(partial_ptr + at.to(tl.int64)[:, None] * V_DIM + dv[None, :], acc, mask=stored)
        tl.store(lse_ptr + at, m + tl.log2(safe), mask=real)
        # All threads' stores precede the count, which has release and acquire semantics at GPU scope.
        tl.debug_barrier()
        counter = counter_ptr + row * HK + head
        seen = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if seen == items - 1:
            tl.store(counter, 0)  # zero again for the next launch
            _merge(
                out_row, lse_ptr, partial_ptr, first, items, head, HQ, stride_oh,
                GROUP, BLOCK_MG, V_DIM, BLOCK_V, BLOCK_S,
            )  # fmt: skip


def _shape(rows: int, k_cache: Tensor, v_cache: Tensor) -> DecodePlanShape:
    _, _, kv_heads, dim = k_cache.shape
    return decode_plan_shape(rows, kv_heads, dim, v_cache.shape[3], k_cache.element_size(), k_cache.device)


@cache
def _regions(rows: int, heads: int, v_dim: int, shape: DecodePlanShape) -> tuple[tuple[tuple, ...], int]:
    """The workspace's parts, each (bytes, dtype): plan, counters, log-sum-exps, partial outputs; and its size."""
    items = rows + shape.target
    counts = (items * PLAN_FIELDS, rows * shape.kv_heads, items * heads, items * heads * v_dim)
    regions, offset = [], 0
    for count, dtype in zip(counts, (torch.int32, torch.int32, torch.float32, torch.float32), strict=True):
        regions.append((slice(offset, offset + count * 4), dtype))
        offset += triton.cdiv(count * 4, _ALIGN) * _ALIGN
    return tuple(regions), offset


def decode_workspace_bytes(rows: int, num_heads: int, k_cache: Tensor, v_cache: Tensor) -> int:
    """Bytes of the uint8 workspace that a decode step of `rows` rows needs.

    Allocate it with `torch.zeros`, once for each shape of step and each window that are in use at the same time; every
    launch leaves it ready for the next. It must not serve two streams at once.
    """
    return _regions(rows, num_heads, v_cache.shape[3], _shape(rows, k_cache, v_cache))[1]


def _check_workspace(workspace: Tensor, rows: int, num_heads: int, k_cache: Tensor, v_cache: Tensor) -> None:
    checks.tensor("workspace", workspace, (None,), (torch.uint8,), k_cache.device)
    need = decode_workspace_bytes(rows, num_heads, k_cache, v_cache)
    if workspace.numel() < need or not workspace.is_contiguous() or workspace.data_ptr() % 16:
        raise ValueError(
            f"workspace has {workspace.numel()} bytes; it must have {need}, contiguous and 16-byte aligned"
        )


def _plan(seq_lens, workspace, k_cache, v_cache, window):
    """Cuts each row's visible keys into near-equal stretches.

    A stretch is `max(min_chunk, total / target)` keys, rounded up to whole tiles, so that their number never exceeds
    `rows + target`, whatever the lengths. A row of length 0 gets one empty stretch, whose program writes the zeros.
    """
    rows = seq_lens.shape[0]
    shape = _shape(rows, k_cache, v_cache)
    capacity = rows + shape.target
    _plan_kernel[(rows,)](
        seq_lens, workspace[: capacity * PLAN_FIELDS * 4].view(torch.int32), rows, window, shape.target,
        shape.min_chunk, capacity, BLOCK_ROWS=triton.next_power_of_2(max(rows, 16)), TILE=shape.tile, BLOCK_WORK=64,
        num_warps=4,
    )  # fmt: skip


@op(_plan, writes=("workspace",))
def plan_decode(seq_lens: Tensor, workspace: Tensor, k_cache: Tensor, v_cache: Tensor, *, window: int = 0) -> Tensor:
    """Cuts one decode step into work items, in `workspace`, which is returned; on the device, once a step and window.

    seq_lens int32 [rows]: KV length of each row, this step's token included; 0 marks a padded row. `window` is that of
    the layers that will run with this plan: 0 for none. The step's layers then pass `planned=True`.
    """
    checks.caches(k_cache, v_cache, k_cache.device)
    checks.vector("seq_lens", seq_lens, None, (torch.int32,), k_cache.device)
    _check_workspace(workspace, seq_lens.shape[0], k_cache.shape[2], k_cache, v_cache)
    return workspace


def _launch(
    query, k_cache, v_cache, block_tables, seq_lens, workspace, scale, out, window, softcap, sinks, alibi_slopes,
    k_scale, v_scale, planned,
):  # fmt: skip
    rows, heads, dim = query.shape
    if not rows:
        return
    if not planned:
        _plan(seq_lens, workspace, k_cache, v_cache, window)
    page, kv_heads, v_dim = v_cache.shape[1:]
    shape = _shape(rows, k_cache, v_cache)
    config = decode_config(rows, kv_heads, dim, v_dim, query.element_size(), query.device)
    group = heads // kv_heads
    merge_group = triton.next_power_of_2(group)
    block_v = triton.next_power_of_2(max(v_dim, 16))
    regions, _ = _regions(rows, heads, v_dim, shape)
    plan, counters, lse, partial = (workspace[where].view(dtype) for where, dtype in regions)
    scaled = k_scale is not None
    options = overlap(query.device)
    if options["PDL"] and not config.early:
        options = {**options, "launch_pdl": False}
    _decode_kernel[(kv_heads, rows + shape.target)](
        query, k_cache, v_cache, out, block_tables, plan, counters, lse, partial,
        sinks, alibi_slopes, k_scale, v_scale, scale, softcap, heads, kv_heads,
        query.stride(0), query.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), out.stride(0), out.stride(1), block_tables.stride(0),
        1 if scaled and k_scale.numel() > 1 else 0, 1 if scaled and v_scale.numel() > 1 else 0,
        GROUP=group, BLOCK_G=max(16, merge_group), BLOCK_MG=merge_group, DIM=dim,
        BLOCK_D=triton.next_power_of_2(max(dim, 16)), V_DIM=v_dim, BLOCK_V=block_v, PAGE=page, TILE=shape.tile,
        BLOCK_S=max(1, min(32, config.merge * 512 // (merge_group * block_v))),
        SOFTCAP=softcap > 0, SINKS=sinks is not None, ALIBI=alibi_slopes is not None, SCALED=scaled, EARLY=config.early,
        num_warps=config.num_warps, num_stages=config.num_stages, **options,
    )  # fmt: skip


def _reference(
    query, k_cache, v_cache, block_tables, seq_lens, scale, out, window, softcap, sinks, alibi_slopes, k_scale, v_scale
):
    starts = torch.arange(query.shape[0] + 1)
    attention.reference(
        query, k_cache, v_cache, out, starts, seq_lens, block_tables, scale, window, softcap, sinks, alibi_slopes,
        k_scale, v_scale,
    )  # fmt: skip


@op(_launch, _reference, writes=("out", "workspace"))
def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    workspace: Tensor | None = None,
    *,
    scale: float,
    out: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    planned: bool = False,
    impl: str = "triton",
    debug: bool = False,
) -> Tensor:
    """Attention of one query token a row over its paged keys; returns `out` [rows, heads, value dim].

    query [rows, heads, dim]; k_cache [blocks, page, kv heads, dim] and v_cache [blocks, page, kv heads, value dim], of
    the query's dtype or float8_e4m3fn with `k_scale` and `v_scale` (float32, one or one a KV head: cached * scale is
    the true value); block_tables int32 [rows, max blocks]; seq_lens int32 [rows]. Row r's query is at position
    seq_lens[r] - 1 and sees the last `window` keys (0: all). `sinks` and `alibi_slopes` are per query head; see
    `attention.attend` for the formula. Rows of length 0 give zeros. `workspace` as `decode_workspace_bytes` says;
    `planned`: `plan_decode` has run for these lengths and this window.
    """
    checks.caches(k_cache, v_cache, query.device)
    out = attention.check(query, k_cache, v_cache, out, scale, window, softcap, sinks, alibi_slopes, k_scale, v_scale)
    attention.check_tables(block_tables, seq_lens, query.shape[0], query.device)
    if debug:
        attention.check_table_values(block_tables, seq_lens, k_cache)
    if impl == "triton" and query.shape[0]:
        _check_workspace(workspace, query.shape[0], query.shape[1], k_cache, v_cache)
    return out
