"""Writing keys and values to the paged cache, with rotary embedding.

Rotary embedding after Su et al., 2021: pair (a, b) of a head turns to (a cos - b sin, b cos + a sin). In the half
layout element i pairs with i + rotary / 2 (Llama), in the interleaved one 2 i pairs with 2 i + 1 (GPT-J, GLM).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .common import await_previous, overlap, wide
from .op import op


@triton.jit
def _quantize(x, inverse, FP8: tl.constexpr):
    """Scales x for an fp8 cache and clamps it to e4m3's range, +-448; other caches take x as it is."""
    if FP8:
        x = tl.minimum(tl.maximum(x.to(tl.float32) * inverse, -448.0), 448.0)
    return x


@triton.jit
def _rotate_heads(
    src, dst, cos_ptr, sin_ptr, h, ok, stride_s, stride_d, stride_c, inverse,
    DIM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Rotates heads `h` (where `ok`) of one token from `src` to `dst`; elements from ROTARY on are copied."""
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
    """BLOCK_H heads of one token: of q (rotated to q_out), of k (rotated to the cache) or of v (to the cache)."""
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


def _launch(
    query, key, value, k_cache, v_cache, slot_mapping, cos, sin, query_out, key_out, interleaved, k_scale, v_scale
):
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
        K_BLOCKS=k_blocks, BLOCKS=q_blocks + 2 * k_blocks, BLOCK_H=block_h,
        K_OUT=key_out is not None and rotary > 0, FP8=fp8, num_warps=4, **overlap(key.device),
    )  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of x [tokens, heads, dim] by cos, sin [tokens, rotary / 2], in float32, rounded once."""
    half = cos.shape[1]
    y = wide(x).clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = wide(x)[..., first], wide(x)[..., second]
    c, s = cos.to(y.dtype)[:, None], sin.to(y.dtype)[:, None]
    y[..., first] = a * c - b * s
    y[..., second] = b * c + a * s
    return y


def _store(x: Tensor, cache: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    if scale is not None:
        x = (x.float() / scale.float().view(-1, 1)).clamp(-448, 448)
    keep = slots >= 0
    page = cache.shape[1]
    where = (slots[keep] // page, slots[keep] % page)
    if cache.element_size() == 1:
        cache.view(torch.uint8)[where] = x[keep].to(cache.dtype).view(torch.uint8)
    else:
        cache[where] = x[keep].to(cache.dtype)


def _reference(
    query, key, value, k_cache, v_cache, slot_mapping, cos, sin, query_out, key_out, interleaved, k_scale, v_scale
):
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


@op(_launch, _reference, writes=("query_out", "key_out", "k_cache", "v_cache"))
def write_cache(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    query: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_out: Tensor | None = None,
    key_out: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    impl: str = "triton",
    debug: bool = False,
) -> Tensor | None:
    """Stores key [tokens, kv heads, dim] and value at slot_mapping int64 [tokens], block * page + offset.

    A negative slot stores nothing. With cos and sin [tokens, rotary / 2] (any float dtype, any strides), the first
    `rotary` elements of each head of query and key are rotated, in the half layout or the `interleaved` one; the query
    goes to `query_out` (default: in place), which is returned, the key also to `key_out` where given (it may be `key`).
    Elements past `rotary` are copied. fp8 caches take key / k_scale, clamped to e4m3's range. `value` and the caches
    must not overlap.
    """
    checks.dense("key", key, (None,) * 3, checks.FLOATS)
    device = key.device
    checks.caches(k_cache, v_cache, device)
    checks.dense("key", key, (None, *k_cache.shape[2:]), checks.FLOATS)
    checks.dense("value", value, (key.shape[0], *v_cache.shape[2:]), (key.dtype,), device)
    checks.vector("slot_mapping", slot_mapping, key.shape[0], (torch.int64,), device)
    checks.scales(k_cache, k_scale, v_scale)
    if k_cache.dtype not in (key.dtype, checks.FP8):
        raise TypeError(f"key has dtype {key.dtype}; it must be the cache's, {k_cache.dtype}, or that float8_e4m3fn")
    query_out = query if query_out is None else query_out
    _check_rotary(key, query, cos, sin, query_out, key_out)
    if debug:
        _check_slots(slot_mapping, k_cache)
    return query_out


def _check_rotary(key, query, cos, sin, query_out, key_out) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin belong together: give both or neither")
    if cos is None:
        if query is not None or key_out is not None:
            raise ValueError("query and key_out are for rotary embedding; without cos and sin they must be None")
        return
    tokens, _, dim = key.shape
    for name, x in (("cos", cos), ("sin", sin)):
        checks.tensor(name, x, (tokens, None), (*checks.FLOATS, torch.float64), key.device)
    if not 1 <= cos.shape[1] <= dim // 2 or sin.shape != cos.shape or sin.stride() != cos.stride():
        raise ValueError(
            f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; they must be alike (strides too), "
            f"[{tokens}, rotary / 2] with rotary / 2 at most {dim // 2}"
        )
    if query is not None:
        checks.dense("query", query, (tokens, None, dim), (key.dtype,), key.device)
        checks.dense("query_out", query_out, query.shape, (key.dtype,), key.device)
    if key_out is not None:
        checks.dense("key_out", key_out, key.shape, (key.dtype,), key.device)


def _check_slots(slot_mapping: Tensor, k_cache: Tensor) -> None:
    """Debug only, since it waits for the device: slots are negative, or exist and differ."""
    slots = slot_mapping[slot_mapping >= 0]
    limit = k_cache.shape[0] * k_cache.shape[1]
    if slots.numel() and int(slots.max()) >= limit:
        raise ValueError(f"slot_mapping holds {int(slots.max())}; allowed are negative numbers and 0 to {limit - 1}")
    if slots.unique().numel() != slots.numel():
        raise ValueError("slot_mapping holds a slot twice; each token needs its own")
