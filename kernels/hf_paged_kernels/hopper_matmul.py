"""Linear layers for many tokens on Hopper, warp-specialised, in Gluon (Triton's lower level).

Programs are persistent. In each, one warp copies tiles of tokens and weights to shared memory with the tensor-copy
engine, a warpgroup for every 64 tokens of a tile multiplies, and results leave through shared memory, also by the copy
engine, while the next tile's product is computed. K is never split and its products are added up 16 at a time, as in
`hopper_linear` and in the portable kernel: a token's result has the same bits in each of them, with any tile.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .activation import activate
from .common import overlap
from .copies import CHUNK, async_load, async_store, barriers, descriptor, pieces, whole
from .heuristics import MatmulConfig

_activate = gluon.jit(activate.fn)
PIECE = gl.constexpr(16)  # tokens that are copied at once
GROUP = gl.constexpr(16)  # tiles of tokens multiplied one after the other with a tile of weights, while it is in L2


@gluon.jit
def _place(item, tiles_t, tiles_n):
    """(tile of tokens, tile of weights) of an item: GROUP tiles of tokens with all weights, then the next GROUP."""
    group = item // (GROUP * tiles_n)
    size = gl.minimum(tiles_t - group * GROUP, GROUP)
    rest = item - group * (GROUP * tiles_n)
    return group * GROUP + rest % size, rest // size


@gluon.jit
def _stream(
    x_desc, piece_desc, w_desc, x_pieces, w_pieces, full, empty, tokens, n, items, tiles_t, tiles_n,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Copies each item's operands; of a gated one half the rows from the gate, half from the up projection.

    The copy engine is slowest where there is nothing to copy: with a tile of tokens half empty, a product took up to
    twice as long. So such a tile is copied in pieces, without those that have no tokens; their memory keeps its old
    content, and results computed from it are not stored.
    """
    PARTS: gl.constexpr = 2 if GATED else 1
    ROWS: gl.constexpr = BLOCK_N // PARTS
    PIECES: gl.constexpr = BLOCK_T // PIECE
    x_tiles = whole(x_pieces, STAGES, BLOCK_T, 64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        t, c = _place(item, tiles_t, tiles_n)
        filled = gl.minimum(gl.cdiv(tokens - t * BLOCK_T, PIECE), PIECES)
        for s in range(STEPS):
            stage = done % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
            for i in gl.static_range(PIECES):
                mbarrier.expect(arrived, ((i + 1) * PIECE + BLOCK_N) * 128, pred=filled == i + 1)
            if filled == PIECES:
                async_load(x_desc, [t * BLOCK_T, s * 64], arrived, x_tiles.index(stage))
            else:
                for i in gl.static_range(PIECES - 1):
                    to = x_pieces.index(stage * PIECES + i)
                    async_load(piece_desc, [t * BLOCK_T + i * PIECE, s * 64], arrived, to, pred=i < filled)
            for i in gl.static_range(PARTS):
                async_load(w_desc, [c * ROWS + i * n, s * 64], arrived, w_pieces.index(stage * PARTS + i))
            done += 1


@gluon.jit
def _add_bias(y, bias_ptr, first, n):
    """Adds bias[first:] to the columns of y; the bias has `n` elements."""
    at = first + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, y.type.layout))
    return y + gl.load(bias_ptr + at, mask=at < n, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _store(
    y, t, c, bias_ptr, residual_ptr, out_desc, leaving, tokens, n, stride_r,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Adds bias and residual to y, tile (t, c) of the result, and starts its copy to `out`."""
    row = t * y.shape[0]
    column = c * y.shape[1]
    if BIAS:
        y = _add_bias(y, bias_ptr, column, n)
    if RESIDUAL:
        r = (row + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, y.type.layout))).to(gl.int64)
        at = column + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, y.type.layout))
        ok = (r < tokens)[:, None] & (at < n)[None, :]
        y += gl.load(residual_ptr + r[:, None] * stride_r + at[None, :], mask=ok, other=0.0).to(gl.float32)
    tma.store_wait(0)  # the buffer is free once the copy engine has read its last content
    whole(leaving, 1, y.shape[0], y.shape[1]).index(0).store(y.to(out_desc.dtype))
    fence_async_shared()
    for i in gl.static_range(y.shape[1] // 64):
        async_store(out_desc, [row, column + i * 64], leaving.index(i))


@gluon.jit
def _multiply(
    x_pieces, w_pieces, full, empty, leaving, bias_ptr, residual_ptr, out_desc, tokens, n, items, tiles_t, tiles_n,
    stride_r,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    KIND: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warpgroups: start a step's product, then wait for the previous step's, whose stage is then free."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BLOCK_T // 16, 1], [16, BLOCK_N, 16])
    x_tiles = whole(x_pieces, STAGES, BLOCK_T, 64)
    w_tiles = whole(w_pieces, STAGES, BLOCK_N, 64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        acc = gl.zeros([BLOCK_T, BLOCK_N], gl.float32, LAYOUT)
        for s in range(STEPS):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), (done // STAGES) & 1)
            acc = warpgroup_mma(x_tiles.index(stage), w_tiles.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if s > 0:
                mbarrier.arrive(empty.index((done - 1) % STAGES))
            done += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((done - 1) % STAGES))
        t, c = _place(item, tiles_t, tiles_n)
        if HALVES:
            left, right = gl.split(acc.reshape([BLOCK_T, 2, BLOCK_N // 2]).permute((0, 2, 1)))
            if KIND >= 0:
                if BIAS:
                    left = _add_bias(left, bias_ptr, c * (BLOCK_N // 2), n)
                    right = _add_bias(right, bias_ptr + n, c * (BLOCK_N // 2), n)
                _store(
                    _activate(left, KIND) * right, t, c, bias_ptr, residual_ptr, out_desc, leaving, tokens, n,
                    stride_r, False, RESIDUAL,
                )  # fmt: skip
            else:
                _store(
                    left, t, 2 * c, bias_ptr, residual_ptr, out_desc, leaving, tokens, n, stride_r,
                    BIAS, RESIDUAL,
                )  # fmt: skip
                _store(
                    right, t, 2 * c + 1, bias_ptr, residual_ptr, out_desc, leaving, tokens, n, stride_r,
                    BIAS, RESIDUAL,
                )  # fmt: skip
        else:
            _store(
                acc, t, c, bias_ptr, residual_ptr, out_desc, leaving, tokens, n, stride_r, BIAS, RESIDUAL
            )  # fmt: skip
    tma.store_wait(0)


# Sizes that change from step to step are not specialized: Triton compiles no variant for 1 or for multiples of 16.
@gluon.jit(do_not_specialize=["tokens", "items", "tiles_t"])
def _kernel(
    x_desc, piece_desc, w_desc, out_desc, bias_ptr, residual_ptr, tokens, n, items, tiles_t, tiles_n, stride_r,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, HALVES: gl.constexpr,
    KIND: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Sets up shared memory and barriers, and starts the warps.

    An item is the product of BLOCK_T tokens and BLOCK_N rows of weight; with HALVES its halves leave one after the
    other, through the same shared memory.
    """
    dtype: gl.constexpr = w_desc.dtype
    PARTS: gl.constexpr = 2 if KIND >= 0 else 1
    COLUMNS: gl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N
    x_pieces = pieces(dtype, STAGES * (BLOCK_T // PIECE), PIECE)
    w_pieces = pieces(dtype, STAGES * PARTS, BLOCK_N // PARTS)
    leaving = pieces(dtype, COLUMNS // 64, BLOCK_T)
    full, empty = barriers(STAGES, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    x_pieces, w_pieces, full, empty, leaving, bias_ptr, residual_ptr, out_desc, tokens, n, items,
                    tiles_t, tiles_n, stride_r,
                    BLOCK_T, BLOCK_N, STEPS, STAGES, HALVES, KIND, BIAS, RESIDUAL, PDL,
                ),
            ),
            (
                _stream,
                (
                    x_desc, piece_desc, w_desc, x_pieces, w_pieces, full, empty, tokens, n, items, tiles_t, tiles_n,
                    BLOCK_T, BLOCK_N, STEPS, STAGES, KIND >= 0, PDL,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kind: int,
    out: torch.Tensor,
    config: MatmulConfig,
) -> None:
    """Writes `out` [tokens, n]; weight [n, K], or [2 n, K] if `kind` is an activation's (not -1)."""
    tokens, k = x.shape
    n = out.shape[1]
    columns = config.block_n // 2 if kind >= 0 else config.block_n
    tiles_t, tiles_n = triton.cdiv(tokens, config.block_t), triton.cdiv(n, columns)
    r = out if residual is None else residual
    _kernel[(config.programs,)](
        descriptor(x, config.block_t), descriptor(x, PIECE.value), descriptor(weight, columns),
        descriptor(out, config.block_t), bias, r, tokens, n, tiles_t * tiles_n, tiles_t, tiles_n, r.stride(0),
        BLOCK_T=config.block_t, BLOCK_N=config.block_n, STEPS=triton.cdiv(k, CHUNK), STAGES=config.stages,
        HALVES=kind >= 0 or config.block_n > 128, KIND=kind, BIAS=bias is not None, RESIDUAL=residual is not None,
        num_warps=config.block_t // 16, **overlap(x.device),
    )  # fmt: skip
