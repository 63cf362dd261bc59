"""Linear layers for few tokens on Hopper, warp-specialised, in Gluon (Triton's lower level).

Programs are persistent. In each, one warp streams weights to shared memory with the tensor-copy engine, another one the
tokens, and a warpgroup multiplies: a tile of weights is the 64-row operand, so that 8 tokens fill the other. All tokens
are in one tile. Weights do not depend on the previous kernel, so the first warp does not wait for it: while that kernel
ends, and a small norm after it runs, every multiprocessor is already loading a pipeline's worth of weights, and the
memory is never idle between layers (programmatic dependent launch).
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .activation import activate
from .common import await_previous, overlap
from .copies import async_load, barriers, descriptor, pieces, whole
from .heuristics import LinearConfig

_activate = gluon.jit(activate.fn)


@gluon.jit
def _take(empty, full, done, SIZE: gl.constexpr, STAGES: gl.constexpr):
    """Waits until the stage of tile `done` is free; returns (stage, its barrier, which now expects SIZE bytes)."""
    stage = done % STAGES
    mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), SIZE)
    return stage, full.index(stage)


@gluon.jit
def _stream_weights(
    desc, buffer, full, empty, n, items,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    GATED: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Copies the weights of every item; of a gated one half the rows from the gate, half from the up projection."""
    PIECES: gl.constexpr = 2 if GATED else 1
    ROWS: gl.constexpr = BLOCK_N // PIECES
    CHUNKS: gl.constexpr = BLOCK_K // 64
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        row = item // SPLIT * ROWS
        column = item % SPLIT * (STEPS * BLOCK_K)
        for _ in range(STEPS):
            stage, arrived = _take(empty, full, done, BLOCK_N * BLOCK_K * 2, STAGES)
            for c in gl.static_range(CHUNKS):
                for p in gl.static_range(PIECES):
                    to = buffer.index(stage * (PIECES * CHUNKS) + c * PIECES + p)
                    async_load(desc, [row + p * n, column + c * 64], arrived, to)
            column += BLOCK_K
            done += 1
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@gluon.jit
def _stream_tokens(
    desc, buffer, full, empty, items,
    BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Copies the tokens' columns for each tile of weights, after the previous kernel has written them."""
    CHUNKS: gl.constexpr = BLOCK_K // 64
    if PDL:
        tl.extra.cuda.gdc_wait()
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        column = item % SPLIT * (STEPS * BLOCK_K)
        for _ in range(STEPS):
            stage, arrived = _take(empty, full, done, BLOCK_T * BLOCK_K * 2, STAGES)
            for c in gl.static_range(CHUNKS):
                async_load(desc, [0, column + c * 64], arrived, buffer.index(stage * CHUNKS + c))
            column += BLOCK_K
            done += 1


@gluon.jit
def _finish(
    acc, item, bias_ptr, residual_ptr, out_ptr, partial_ptr, tokens, n, stride_r, stride_o,
    BLOCK_N: gl.constexpr, BLOCK_T: gl.constexpr, SPLIT: gl.constexpr, KIND: gl.constexpr, BIAS: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Bias, activation and residual, and the store: of the result, or of a partial one [SPLIT, tokens, n]."""
    GATED: gl.constexpr = KIND >= 0
    ROWS: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    PAIR: gl.constexpr = gl.BlockedLayout([1, 1, 2], [32, 1, 1], [1, 4, 1], [2, 0, 1])
    OUT: gl.constexpr = gl.SliceLayout(2, PAIR) if GATED else gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    c = item // SPLIT * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, OUT))
    t_long = t.to(gl.int64)
    ok = (c < n)[:, None] & (t < tokens)[None, :]
    if GATED:
        y, up = gl.split(gl.convert_layout(acc.reshape([2, ROWS, BLOCK_T]).permute((1, 2, 0)), PAIR))
        if BIAS:
            y += gl.load(bias_ptr + c, mask=c < n, other=0.0).to(gl.float32)[:, None]
            up += gl.load(bias_ptr + n + c, mask=c < n, other=0.0).to(gl.float32)[:, None]
        y = _activate(y, KIND) * up
    else:
        y = gl.convert_layout(acc, OUT)
    if SPLIT > 1:
        gl.store(partial_ptr + (item % SPLIT * tokens + t_long)[None, :] * n + c[:, None], y, mask=ok)
    else:
        if BIAS and not GATED:
            y += gl.load(bias_ptr + c, mask=c < n, other=0.0).to(gl.float32)[:, None]
        if RESIDUAL:
            y += gl.load(residual_ptr + t_long[None, :] * stride_r + c[:, None], mask=ok, other=0.0).to(gl.float32)
        gl.store(out_ptr + t_long[None, :] * stride_o + c[:, None], y.to(out_ptr.dtype.element_ty), mask=ok)


@gluon.jit
def _multiply(
    w_tiles, x_tiles, w_full, w_empty, x_full, x_empty, bias_ptr, residual_ptr, out_ptr, partial_ptr, tokens, n, items,
    stride_r, stride_o,
    BLOCK_N: gl.constexpr, BLOCK_T: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, X_STAGES: gl.constexpr,
    SPLIT: gl.constexpr, KIND: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warpgroup: starts a tile's product, then waits for the previous tile's, whose stages are then free."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_T, 16])
    if PDL:
        tl.extra.cuda.gdc_wait()
    done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        acc = gl.zeros([BLOCK_N, BLOCK_T], gl.float32, LAYOUT)
        for s in range(STEPS):
            stage = done % STAGES
            x_stage = done % X_STAGES
            mbarrier.wait(w_full.index(stage), (done // STAGES) & 1)
            mbarrier.wait(x_full.index(x_stage), (done // X_STAGES) & 1)
            acc = warpgroup_mma(w_tiles.index(stage), x_tiles.index(x_stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if s > 0:
                mbarrier.arrive(w_empty.index((done - 1) % STAGES))
                mbarrier.arrive(x_empty.index((done - 1) % X_STAGES))
            done += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(w_empty.index((done - 1) % STAGES))
        mbarrier.arrive(x_empty.index((done - 1) % X_STAGES))
        _finish(
            acc, item, bias_ptr, residual_ptr, out_ptr, partial_ptr, tokens, n, stride_r, stride_o,
            BLOCK_N, BLOCK_T, SPLIT, KIND, BIAS, RESIDUAL,
        )  # fmt: skip


# Sizes that change from step to step are not specialized: Triton compiles no variant for 1 or for multiples of 16.
@gluon.jit(do_not_specialize=["tokens", "items"])
def _kernel(
    x_desc, w_desc, bias_ptr, residual_ptr, out_ptr, partial_ptr, tokens, n, items, stride_r, stride_o,
    BLOCK_N: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    X_STAGES: gl.constexpr, SPLIT: gl.constexpr, KIND: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    PDL: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Sets up shared memory and barriers, and starts the warps.

    An item is BLOCK_N rows of weight, for BLOCK_T tokens, over STEPS tiles of K: all of K, or one of its SPLIT parts.
    """
    dtype: gl.constexpr = w_desc.dtype
    HALVES: gl.constexpr = 2 if KIND >= 0 else 1
    CHUNKS: gl.constexpr = BLOCK_K // 64
    w_buffer = pieces(dtype, STAGES * CHUNKS * HALVES, BLOCK_N // HALVES)
    x_buffer = pieces(dtype, X_STAGES * CHUNKS, BLOCK_T)
    w_full, w_empty = barriers(STAGES, 1)
    x_full, x_empty = barriers(X_STAGES, 1)
    w_tiles = whole(w_buffer, STAGES, BLOCK_N, BLOCK_K)
    x_tiles = whole(x_buffer, X_STAGES, BLOCK_T, BLOCK_K)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    w_tiles, x_tiles, w_full, w_empty, x_full, x_empty, bias_ptr, residual_ptr, out_ptr, partial_ptr,
                    tokens, n, items, stride_r, stride_o,
                    BLOCK_N, BLOCK_T, STEPS, STAGES, X_STAGES, SPLIT, KIND, BIAS, RESIDUAL, PDL,
                ),
            ),
            (
                _stream_weights,
                (
                    w_desc, w_buffer, w_full, w_empty, n, items,
                    BLOCK_N, BLOCK_K, STEPS, STAGES, SPLIT, KIND >= 0, PDL, EARLY,
                ),
            ),
            (
                _stream_tokens,
                (
                    x_desc, x_buffer, x_full, x_empty, items, BLOCK_T, BLOCK_K, STEPS, X_STAGES, SPLIT, PDL,
                ),
            ),
        ],
        [1, 1],
        [40, 40],
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _combine_kernel(
    partial_ptr, bias_ptr, residual_ptr, out_ptr, tokens, n, stride_r, stride_o,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds the SPLIT partial results of BLOCK outputs of one token, then bias and residual."""
    await_previous(PDL)
    t = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, SPLIT)
    ok = c < n
    y = tl.sum(tl.load(partial_ptr + (part * tokens + t)[:, None] * n + c[None, :], mask=ok[None, :], other=0.0), 0)
    if BIAS:
        y += tl.load(bias_ptr + c, mask=ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        y += tl.load(residual_ptr + t * stride_r + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * stride_o + c, y.to(out_ptr.dtype.element_ty), mask=ok)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    kind: int,
    out: torch.Tensor,
    config: LinearConfig,
) -> None:
    """Writes `out` [tokens, n], at most 64 tokens; weight [n, K], or [2 n, K] if `kind` is an activation's (not -1)."""
    tokens, k = x.shape
    n = out.shape[1]
    rows = config.block_n // 2 if kind >= 0 else config.block_n
    items = triton.cdiv(n, rows) * config.split
    r = out if residual is None else residual
    partial = x.new_empty(config.split, tokens, n, dtype=torch.float32) if config.split > 1 else None
    extras = {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    _kernel[(min(items, config.programs),)](
        descriptor(x, config.block_t), descriptor(weight, rows), bias, r, out, partial, tokens, n, items,
        r.stride(0), out.stride(0), BLOCK_N=config.block_n, BLOCK_T=config.block_t, BLOCK_K=config.block_k,
        STEPS=triton.cdiv(k, config.block_k * config.split), STAGES=config.stages, X_STAGES=config.x_stages,
        SPLIT=config.split, KIND=kind, EARLY=config.early, num_warps=4, maxnreg=128, **extras, **overlap(x.device),
    )  # fmt: skip
    if config.split > 1:
        block = 256 if tokens < 16 else 1024
        _combine_kernel[(triton.cdiv(n, block), tokens)](
            partial, bias, r, out, tokens, n, r.stride(0), out.stride(0), SPLIT=config.split, BLOCK=block, num_warps=4,
            **extras, **overlap(x.device),
        )  # fmt: skip
