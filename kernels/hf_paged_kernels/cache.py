"""Writing to the paged cache, with rotary embedding on the way, and copying blocks for copy-on-write.

Rotary embedding after Su et al., 2021: pair (a, b) of a head turns to (a cos - b sin, b cos + a sin). In the half
layout element i pairs with i + rotary / 2 (Llama), in the interleaved one 2 i pairs with 2 i + 1 (GPT-J, GLM).
"""

import torch
import triton
import triton.language as tl

from .common import await_previous, overlap


@triton.jit
def _quantize(x, inverse, FP8: tl.constexpr):
    """Scales into e4m3's range, whose largest number is 448; other caches take x as it is."""
    if FP8:
        x = tl.minimum(tl.maximum(x.to(tl.float32) * inverse, -448.0), 448.0)
    return x


@triton.jit
def _rotate_heads(
    src, dst, cos_ptr, sin_ptr, h, ok, stride_s, stride_d, stride_c, inverse,
    DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Rotates heads `h` (where `ok`) of one token from `src` to `dst`, and copies what partial rotary leaves."""
    HALF: tl.constexpr = ROTARY // 2
    i = tl.arange(0, BLOCK_R)
    c = tl.load(cos_ptr + i * stride_c, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin_ptr + i * stride_c, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    dtype = dst.dtype.element_ty
    if INTERLEAVED:
        j = tl.arange(0, 2 * BLOCK_R)
        pair_ok = ok[:, None] & (j < ROTARY)[None, :]
        x = tl.load(src + h[:, None] * stride_s + j[None, :], mask=pair_ok, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK_R, 2]))
        y = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [x.shape[0], 2 * BLOCK_R])
        tl.store(dst + h[:, None] * stride_d + j[None, :], _quantize(y, inverse, FP8).to(dtype), mask=pair_ok)
    else:
        half_ok = ok[:, None] & (i < HALF)[None, :]
        at = src + h[:, None] * stride_s + i[None, :]
        a = tl.load(at, mask=half_ok, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=half_ok, other=0.0).to(tl.float32)
        to = dst + h[:, None] * stride_d + i[None, :]
        tl.store(to, _quantize(a * c - b * s, inverse, FP8).to(dtype), mask=half_ok)
        tl.store(to + HALF, _quantize(b * c + a * s, inverse, FP8).to(dtype), mask=half_ok)
    if ROTARY < DIM:
        t = ROTARY + tl.arange(0, BLOCK_T)
        rest_ok = ok[:, None] & (t < DIM)[None, :]
        x = tl.load(src + h[:, None] * stride_s + t[None, :], mask=rest_ok, other=0.0)
        tl.store(dst + h[:, None] * stride_d + t[None, :], _quantize(x, inverse, FP8).to(dtype), mask=rest_ok)


@triton.jit
def _copy_heads(
    src, dst, h, ok, stride_s, stride_d, inverse, DIM: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr
):
    d = tl.arange(0, BLOCK_D)
    full = ok[:, None] & (d < DIM)[None, :]
    x = tl.load(src + h[:, None] * stride_s + d[None, :], mask=full, other=0.0)
    tl.store(dst + h[:, None] * stride_d + d[None, :], _quantize(x, inverse, FP8).to(dst.dtype.element_ty), mask=full)


@triton.jit
def _write_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, cos_ptr, sin_ptr,
    k_scale_ptr, v_scale_ptr, HQ, HK,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_qot, stride_qoh, stride_kot, stride_koh,
    stride_kcb, stride_kct, stride_kch, stride_vcb, stride_vct, stride_vch, stride_ct, stride_c, stride_ks, stride_vs,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    ROTARY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr,
    K_OUT: tl.constexpr, FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token: of q (rotated to q_out), else of k (rotated to the cache) and v (to the cache)."""
    await_previous(PDL)
    block = tl.program_id(0) % BLOCKS
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    cos = cos_ptr
    sin = sin_ptr
    if ROTARY > 0:
        cos = cos_ptr + token * stride_ct
        sin = sin_ptr + token * stride_ct
    if block < Q_BLOCKS:
        if ROTARY > 0:
            h = block * BLOCK_H + tl.arange(0, BLOCK_H)
            _rotate_heads(
                q_ptr + token * stride_qt, q_out_ptr + token * stride_qot, cos, sin, h, h < HQ, stride_qh, stride_qoh,
                stride_c, 1.0, DIM, ROTARY, BLOCK_R, BLOCK_T, INTERLEAVED, False,
            )  # fmt: skip
    else:
        is_k = block < Q_BLOCKS + K_BLOCKS
        slot = tl.load(slots_ptr + token)
        page = slot // PAGE
        inner = slot % PAGE
        if is_k:
            h = (block - Q_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
            inverse = h.to(tl.float32)
            if FP8:
                inverse = 1.0 / tl.load(k_scale_ptr + h * stride_ks, mask=h < HK, other=1.0)
            inverse = inverse[:, None]
            k_row = k_ptr + token * stride_kt
            if slot >= 0:
                k_to = k_cache_ptr + page * stride_kcb + inner * stride_kct
                if ROTARY > 0:
                    _rotate_heads(
                        k_row, k_to, cos, sin, h, h < HK, stride_kh, stride_kch, stride_c, inverse,
                        DIM, ROTARY, BLOCK_R, BLOCK_T, INTERLEAVED, FP8,
                    )  # fmt: skip
                else:
                    _copy_heads(k_row, k_to, h, h < HK, stride_kh, stride_kch, inverse, DIM, BLOCK_D, FP8)
            if K_OUT:
                # After the cache write: k_out may be k itself.
                tl.debug_barrier()
                k_to = k_out_ptr + token * stride_kot
                _rotate_heads(
                    k_row, k_to, cos, sin, h, h < HK, stride_kh, stride_koh, stride_c, 1.0,
                    DIM, ROTARY, BLOCK_R, BLOCK_T, INTERLEAVED, False,
                )  # fmt: skip
        else:
            h = (block - Q_BLOCKS - K_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
            inverse = h.to(tl.float32)
            if FP8:
                inverse = 1.0 / tl.load(v_scale_ptr + h * stride_vs, mask=h < HK, other=1.0)
            inverse = inverse[:, None]
            if slot >= 0:
                v_to = v_cache_ptr + page * stride_vcb + inner * stride_vct
                _copy_heads(
                    v_ptr + token * stride_vt, v_to, h, h < HK, stride_vh, stride_vch, inverse, V_DIM, BLOCK_V, FP8
                )


def write(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    query_out: torch.Tensor | None,
    key_out: torch.Tensor | None,
    interleaved: bool,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Writes k and v of every token with a slot to the caches; with cos and sin rotates q and k first."""
    tokens, kv_heads, dim = key.shape
    if not tokens:
        return
    v_dim = value.shape[2]
    rotary = 0 if cos is None else 2 * cos.shape[1]
    rotates_q = query is not None and rotary > 0
    heads = query.shape[1] if rotates_q else 0
    block_h = min(16, triton.next_power_of_2(max(heads, kv_heads)))
    q_blocks, k_blocks = triton.cdiv(heads, block_h), triton.cdiv(kv_heads, block_h)
    q, q_out = (query, query_out) if rotates_q else (key, key)
    k_out = key if key_out is None else key_out
    fp8 = k_scale is not None
    _write_kernel[((q_blocks + 2 * k_blocks) * tokens,)](
        q, key, value, q_out, k_out, k_cache, v_cache, slot_mapping, cos, sin, k_scale, v_scale, heads, kv_heads,
        q.stride(0), q.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        q_out.stride(0), q_out.stride(1), k_out.stride(0), k_out.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        cos.stride(0) if rotary else 0, cos.stride(1) if rotary else 0,
        1 if fp8 and k_scale.numel() > 1 else 0, 1 if fp8 and v_scale.numel() > 1 else 0,
        PAGE=k_cache.shape[1], DIM=dim, BLOCK_D=triton.next_power_of_2(dim), V_DIM=v_dim,
        BLOCK_V=triton.next_power_of_2(v_dim), ROTARY=rotary, BLOCK_R=triton.next_power_of_2(max(rotary // 2, 1)),
        BLOCK_T=triton.next_power_of_2(max(dim - rotary, 1)), INTERLEAVED=interleaved, Q_BLOCKS=q_blocks,
        K_BLOCKS=k_blocks,
        BLOCKS=q_blocks + 2 * k_blocks, BLOCK_H=block_h, K_OUT=key_out is not None and rotary > 0, FP8=fp8, num_warps=4,
        **overlap(key.device),
    )  # fmt: skip


@triton.jit
def _copy_kernel(bases_ptr, pairs_ptr, block_words, block_stride, BLOCK: tl.constexpr):
    """One piece of one (source, destination) pair in one tensor, moved as 8-byte words."""
    source = tl.load(pairs_ptr + tl.program_id(0) * 2)
    target = tl.load(pairs_ptr + tl.program_id(0) * 2 + 1)
    if source < 0 or target < 0:
        return
    base = tl.load(bases_ptr + tl.program_id(2)).to(tl.pointer_type(tl.int64))
    base = tl.multiple_of(base, 16)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < block_words
    word = tl.load(base + source * block_stride + at, mask=ok)
    tl.store(base + target * block_stride + at, word, mask=ok)


def copy_blocks(bases: torch.Tensor, pairs: torch.Tensor, block_bytes: int, stride_bytes: int) -> None:
    """Copies blocks in all tensors whose addresses are `bases`: pairs [n, 2] of (source, destination) block ids."""
    words = block_bytes // 8
    block = min(4096, triton.next_power_of_2(words))
    if pairs.shape[0]:
        _copy_kernel[(pairs.shape[0], triton.cdiv(words, block), bases.shape[0])](
            bases, pairs, words, stride_bytes // 8, BLOCK=block, num_warps=8
        )
