"""Variable-length causal attention for Hopper, warp-specialised, in Gluon (Triton's lower level).

Programs are persistent, one a multiprocessor. In each, one producer warp copies tiles of keys and values to shared
memory with the tensor-copy engine, page by page where they are paged, and continues into the next piece of work; two
consumer warpgroups of 64 query rows each multiply, and each starts the scores of a tile together with the values'
product of the previous tile (FlashAttention-3, Shah et al., 2024). While one warpgroup is in its softmax, prologue or
epilogue, the other keeps the tensor cores busy. `prefill` serves the calls that this kernel does not: see `supports`.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .copies import DTYPES, async_load, barriers, descriptor, pieces, runs_on, whole
from .heuristics import hopper_config, sm_count

ROWS_M = 128  # (token, head) rows of a program, in two halves


@triton.constexpr_function
def _wgmma_layout(n):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@triton.constexpr_function
def _vector_layout(warps):
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def _locate(
    work, starts_ptr, lens_ptr, tokens, rows, HK,
    TOKENS_M: gl.constexpr, BLOCK_ROWS: gl.constexpr, PAGED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Describes piece `work`: (head, row, its first token within the row, row start, row length, KV length).

    Row r has the tiles from starts[r] // TOKENS_M + r on, as in `prefill`; a piece past its row's end has no tokens.
    """
    head = work % HK
    tile = work // HK
    i = gl.arange(0, BLOCK_ROWS, layout=_vector_layout(WARPS))
    begins = gl.load(starts_ptr + i, mask=i <= rows, other=0)
    row = gl.sum(((begins // TOKENS_M + i <= tile) & (i <= rows)).to(gl.int32), 0) - 1
    q_start = gl.load(starts_ptr + row)
    q_stop = tokens
    kv_len = 0
    if row < rows:
        q_stop = gl.load(starts_ptr + row + 1)
        kv_len = q_stop - q_start
        if PAGED:
            kv_len = gl.load(lens_ptr + row)
    index = (tile - (q_start // TOKENS_M + row)) * TOKENS_M
    return head, row, index, q_start, q_stop - q_start, kv_len


@gluon.jit
def _tile_count(index, q_len, kv_len, TOKENS_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Number of tiles of keys that the piece sees; one, all masked, if it sees none."""
    stop = gl.minimum(kv_len - q_len + gl.minimum(index + TOKENS_M, q_len), kv_len)
    return gl.maximum(gl.cdiv(stop, BLOCK_N), 1)


@gluon.jit
def _copy_tile(
    desc, buffer, full, stage, t, first_row, column, table, last_page,
    BLOCK_N: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, ROWS: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one tile [BLOCK_N, DIM] into pieces of [ROWS, 64], column chunks outermost."""
    PIECES: gl.constexpr = BLOCK_N // ROWS
    CHUNKS: gl.constexpr = DIM // 64
    mbarrier.expect(full, BLOCK_N * DIM * 2)
    base = stage * (PIECES * CHUNKS)
    for i in gl.static_range(PIECES):
        at = t + i * ROWS
        if PAGED:
            # Past the end the last page is copied again, and masked.
            page = gl.load(table + gl.minimum(at // PAGE, last_page))
            row = page * PAGE + at % PAGE
        else:
            row = first_row + at
        for c in gl.static_range(CHUNKS):
            async_load(desc, [row, column + c * 64], full, buffer.index(base + c * PIECES + i))


@gluon.jit
def _produce(
    k_desc, v_desc, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty, table_ptr, starts_ptr, lens_ptr, tokens, rows,
    HK, total, stride_tr,
    GROUP: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, ROWS: gl.constexpr, PAGED: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BLOCK_ROWS: gl.constexpr,
):  # fmt: skip
    """Copies every tile of every piece of work, as buffers become free."""
    TOKENS_M: gl.constexpr = 128 // GROUP
    done = 0
    for program in range(gl.program_id(0), total, gl.num_programs(0)):
        head, row, index, q_start, q_len, kv_len = _locate(
            total - 1 - program, starts_ptr, lens_ptr, tokens, rows, HK, TOKENS_M, BLOCK_ROWS, PAGED, 1
        )
        if index < q_len:
            tiles = _tile_count(index, q_len, kv_len, TOKENS_M, BLOCK_N)
            table = table_ptr + gl.minimum(row, rows - 1).to(gl.int64) * stride_tr
            last_page = gl.maximum(kv_len - 1, 0) // PAGE
            for j in range(tiles):
                stage = (done + j) % STAGES
                phase = ((done + j) // STAGES) & 1
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                _copy_tile(
                    k_desc, k_buffer, k_full.index(stage), stage, j * BLOCK_N, q_start, head * DIM, table, last_page,
                    BLOCK_N, DIM, PAGE, ROWS, PAGED,
                )  # fmt: skip
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                _copy_tile(
                    v_desc, v_buffer, v_full.index(stage), stage, j * BLOCK_N, q_start, head * DIM, table, last_page,
                    BLOCK_N, DIM, PAGE, ROWS, PAGED,
                )  # fmt: skip
            done += tiles


@gluon.jit
def _softmax(s, m, l, q_pos, t, kv_len, scale2, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, MASKED: gl.constexpr):
    if MASKED:
        pos = t + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        seen = (pos[None, :] <= q_pos[:, None]) & (pos < kv_len)[None, :]
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale2)
    p = gl.exp2(s * scale2 - m_new[:, None])
    alpha = gl.exp2(m - m_new)
    return p, m_new, l * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _step(
    j, done, acc, m, l, p, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, q_pos, kv_len, scale2,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The scores of tile j together with the values of tile j - 1, then the softmax of tile j."""
    at = done + j
    stage = at % STAGES
    before = (at - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (at // STAGES) & 1)
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((at - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(stage))
    weights, m, l, alpha = _softmax(s, m, l, q_pos, j * BLOCK_N, kv_len, scale2, S_LAYOUT, BLOCK_N, MASKED)
    weights = gl.convert_layout(weights.to(p.dtype), P_LAYOUT)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, m, l, weights


@gluon.jit
def _clear_tail(v_buffer, stage, t, kv_len, BLOCK_N: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr):
    """Zeroes a tile's rows from kv_len on: their weights are 0, but 0 times the memory's old content might be NaN.

    Both consumers do it, with the same result.
    """
    PIECES: gl.constexpr = BLOCK_N // ROWS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(PIECES):
        if t + (i + 1) * ROWS > kv_len:
            for c in gl.static_range(DIM // 64):
                piece = v_buffer.index(stage * (PIECES * (DIM // 64)) + c * PIECES + i)
                x = piece.load(LAYOUT)
                piece.store(gl.where((t + i * ROWS + row < kv_len)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()


@gluon.jit
def _attend(
    HALF: gl.constexpr, done, tiles, full_tiles, q, k_tiles, v_tiles, v_buffer, k_full, k_empty, v_full, v_empty,
    out_ptr, index, q_start, q_len, kv_len, head, scale2, stride_ot, stride_oh,
    GROUP: gl.constexpr, DIM: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attends 64 of a piece's rows, whose queries are in `q`, to all its tiles."""
    S_LAYOUT: gl.constexpr = _wgmma_layout(BLOCK_N)
    O_LAYOUT: gl.constexpr = _wgmma_layout(DIM)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    r = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    q_pos = kv_len - q_len + index + r // GROUP
    m = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    l = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros([64, DIM], gl.float32, O_LAYOUT)
    stage = done % STAGES
    mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
    s = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), s, use_acc=False)
    mbarrier.arrive(k_empty.index(stage))
    weights, m, l, _ = _softmax(s, m, l, q_pos, 0, kv_len, scale2, S_LAYOUT, BLOCK_N, True)
    p = gl.convert_layout(weights.to(q.dtype), P_LAYOUT)
    for j in range(1, full_tiles):
        acc, m, l, p = _step(
            j, done, acc, m, l, p, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, q_pos, kv_len, scale2,
            S_LAYOUT, P_LAYOUT, BLOCK_N, STAGES, False,
        )  # fmt: skip
    for j in range(gl.maximum(full_tiles, 1), tiles):
        acc, m, l, p = _step(
            j, done, acc, m, l, p, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, q_pos, kv_len, scale2,
            S_LAYOUT, P_LAYOUT, BLOCK_N, STAGES, True,
        )  # fmt: skip
    last = done + tiles - 1
    stage = last % STAGES
    mbarrier.wait(v_full.index(stage), (last // STAGES) & 1)
    if tiles * BLOCK_N > kv_len:
        _clear_tail(v_buffer, stage, (tiles - 1) * BLOCK_N, kv_len, BLOCK_N, DIM, ROWS)
    acc = warpgroup_mma(p, v_tiles.index(stage), acc)
    mbarrier.arrive(v_empty.index(stage))
    norm = 1.0 / gl.where(l > 0, l, 1.0)
    acc = acc * gl.convert_layout(norm, gl.SliceLayout(1, O_LAYOUT))[:, None]
    o = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, O_LAYOUT))
    token = (q_start + index + o // GROUP).to(gl.int64)
    at = out_ptr + (token * stride_ot + (head * GROUP + o % GROUP) * stride_oh)[:, None] + d[None, :]
    gl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(index + o // GROUP < q_len)[:, None])


@gluon.jit
def _consume(
    HALF: gl.constexpr, q_ptr, q, k_tiles, v_tiles, v_buffer, k_full, k_empty, v_full, v_empty, out_ptr, starts_ptr,
    lens_ptr, scale, tokens, rows, HK, total, stride_qt, stride_qh, stride_ot, stride_oh,
    GROUP: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr, PAGED: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_ROWS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of every piece of work; `q` [64, DIM] is its own shared memory."""
    TOKENS_M: gl.constexpr = 128 // GROUP
    L2: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, L2))
    r = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, L2))
    done = 0
    for program in range(gl.program_id(0), total, gl.num_programs(0)):
        head, _, index, q_start, q_len, kv_len = _locate(
            total - 1 - program, starts_ptr, lens_ptr, tokens, rows, HK, TOKENS_M, BLOCK_ROWS, PAGED, 4
        )
        if index < q_len:
            token = (q_start + index + r // GROUP).to(gl.int64)
            at = q_ptr + (token * stride_qt + (head * GROUP + r % GROUP) * stride_qh)[:, None] + d[None, :]
            q.store(gl.load(at, mask=(index + r // GROUP < q_len)[:, None], other=0.0))
            fence_async_shared()
            tiles = _tile_count(index, q_len, kv_len, TOKENS_M, BLOCK_N)
            full_tiles = gl.maximum(gl.minimum(kv_len - q_len + index + 1, kv_len), 0) // BLOCK_N
            _attend(
                HALF, done, tiles, full_tiles, q, k_tiles, v_tiles, v_buffer, k_full, k_empty, v_full, v_empty,
                out_ptr, index, q_start, q_len, kv_len, head, scale * 1.4426950408889634, stride_ot, stride_oh,
                GROUP, DIM, BLOCK_N, ROWS, STAGES,
            )  # fmt: skip
            done += tiles


# Sizes that change from step to step are not specialized: Triton compiles no variant for 1 or for multiples of 16.
@gluon.jit(do_not_specialize=["tokens", "rows", "total"])
def _kernel(
    q_ptr, k_desc, v_desc, out_ptr, table_ptr, starts_ptr, lens_ptr, scale, tokens, rows, HK, total,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_tr,
    GROUP: gl.constexpr, DIM: gl.constexpr, PAGE: gl.constexpr, ROWS: gl.constexpr, PAGED: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BLOCK_ROWS: gl.constexpr,
):  # fmt: skip
    """Sets up shared memory and barriers, and starts the warps."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PIECES: gl.constexpr = STAGES * (BLOCK_N // ROWS) * (DIM // 64)
    q_buffer = gl.allocate_shared_memory(dtype, [2, 64, DIM], SHARED)
    k_buffer = pieces(dtype, PIECES, ROWS)
    v_buffer = pieces(dtype, PIECES, ROWS)
    k_tiles = whole(k_buffer, STAGES, BLOCK_N, DIM)
    v_tiles = whole(v_buffer, STAGES, BLOCK_N, DIM)
    k_full, k_empty = barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, q_ptr, q_buffer.index(0), k_tiles, v_tiles, v_buffer, k_full, k_empty, v_full, v_empty, out_ptr,
                    starts_ptr, lens_ptr, scale, tokens, rows, HK, total, stride_qt, stride_qh, stride_ot, stride_oh,
                    GROUP, DIM, ROWS, PAGED, BLOCK_N, STAGES, BLOCK_ROWS,
                ),
            ),
            (
                _consume,
                (
                    1, q_ptr, q_buffer.index(1), k_tiles, v_tiles, v_buffer, k_full, k_empty, v_full, v_empty, out_ptr,
                    starts_ptr, lens_ptr, scale, tokens, rows, HK, total, stride_qt, stride_qh, stride_ot, stride_oh,
                    GROUP, DIM, ROWS, PAGED, BLOCK_N, STAGES, BLOCK_ROWS,
                ),
            ),
            (
                _produce,
                (
                    k_desc, v_desc, k_buffer, v_buffer, k_full, k_empty, v_full, v_empty, table_ptr, starts_ptr,
                    lens_ptr, tokens, rows, HK, total, stride_tr,
                    GROUP, DIM, PAGE, ROWS, PAGED, BLOCK_N, STAGES, BLOCK_ROWS,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def supports(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: int) -> bool:
    """Whether this kernel serves a call without window, soft-cap, sinks, ALiBi and scales, that need not be invariant.

    It does on Hopper, for a 2-byte dtype, head dim 64 or 128, and groups that divide 128. key and value are [tokens,
    heads, dim], or caches [blocks, page, heads, dim] whose tokens are one row stride apart.
    """
    if not rows or not runs_on(query.device):
        return False
    heads, dim = key.shape[-2:]
    if dim not in (64, 128) or value.shape[-1] != dim or key.dtype not in DTYPES:
        return False
    if ROWS_M % (query.shape[1] // heads) or query.stride(0) % 8 or query.stride(1) % 8 or query.data_ptr() % 16:
        return False
    for x in (key, value):
        if (heads > 1 and x.stride(-2) != dim) or x.stride(-3) % 8 or x.data_ptr() % 16:
            return False
        if x.dim() == 4 and x.stride(0) != x.shape[1] * x.stride(1):
            return False
    return True


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """A 2-D view of keys or values with a row for each token."""
    tokens = x.shape[0] * (x.shape[1] if x.dim() == 4 else 1)
    return x.as_strided((tokens, x.shape[-2] * x.shape[-1]), (x.stride(-3), 1))


def launch(query, key, value, out, query_start_loc, seq_lens, block_tables, scale) -> None:
    """Writes `out`; arguments as in `prefill_attention`, of a call that `supports` approves."""
    tokens, heads, dim = query.shape
    rows = query_start_loc.shape[0] - 1
    kv_heads = key.shape[-2]
    group = heads // kv_heads
    paged = block_tables is not None
    block_n, stages = hopper_config(dim)
    page = key.shape[1] if paged else 1
    piece = page if paged else block_n
    total = kv_heads * (tokens // (ROWS_M // group) + rows + 1)
    _kernel[(min(total, sm_count(query.device)),)](
        query, descriptor(_by_token(key), piece), descriptor(_by_token(value), piece), out,
        block_tables if paged else query_start_loc, query_start_loc, seq_lens if paged else query_start_loc,
        scale, tokens, rows, kv_heads, total, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        block_tables.stride(0) if paged else 0,
        GROUP=group, DIM=dim, PAGE=page, ROWS=piece, PAGED=paged, BLOCK_N=block_n, STAGES=stages,
        BLOCK_ROWS=triton.next_power_of_2(max(rows + 1, 128)), num_warps=4,
    )  # fmt: skip
