"""Cache writes with and without rotary embedding, against float64 or bit for bit."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROTARY = {
    "full": {},
    "partial": {"rotary": 16},
    "interleaved": {"interleaved": True},
    "interleaved partial": {"interleaved": True, "rotary": 24},
    "head dim 80": {"dim": 80},
    "head dim 80, rotary 20": {"dim": 80, "rotary": 20},
    "value dim differs": {"v_dim": 48},
    "no rotary": {"rotary": 0},
    "hnd": {"layout": "hnd"},
    "bf16": {"dtype": torch.bfloat16},
    "fp16, 20 heads": {"dtype": torch.float16, "heads": 20, "kv_heads": 5},
    "cos and sin in the model's dtype, every second one": {"dtype": torch.bfloat16, "strided": True},
}


def setup(
    dim=32, v_dim=None, rotary=None, heads=4, kv_heads=2, dtype=torch.float32, layout="nhd", strided=False, seed=0
):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)

    tokens, blocks, page, v_dim = 11, 4, 16, v_dim or dim
    rotary = dim if rotary is None else rotary
    merged = rand(tokens, (heads + kv_heads) * dim + kv_heads * v_dim)  # as one projection leaves them
    query = merged[:, : heads * dim].view(tokens, heads, dim)
    key = merged[:, heads * dim : (heads + kv_heads) * dim].view(tokens, kv_heads, dim)
    value = merged[:, (heads + kv_heads) * dim :].view(tokens, kv_heads, v_dim)
    caches = []
    for d in (dim, v_dim):
        shape = (blocks, page, kv_heads, d) if layout == "nhd" else (blocks, kv_heads, page, d)
        cache = torch.full(shape, 7.0, device=DEVICE, dtype=dtype)
        caches.append(cache if layout == "nhd" else cache.transpose(1, 2))
    slots = torch.randperm(blocks * page, device=DEVICE, generator=generator)[:tokens]
    slots[3] = -1
    angle = torch.rand(tokens, rotary // 2, device=DEVICE, generator=generator) * 6
    cos, sin = angle.cos(), angle.sin()
    if strided:
        cos, sin = (x.to(dtype).repeat_interleave(2, 1)[:, ::2] for x in (cos, sin))
    return query, key, value, *caches, slots, (cos, sin) if rotary else (None, None)


def expected_cache(cache, rows, slots):
    """The cache after the writes, in float64."""
    flat = cache.double().flatten(0, 1).clone()
    keep = slots >= 0
    flat[slots[keep]] = rows[keep]
    return flat.view(cache.shape)


def close(kit, got, expected, scale=None):
    """Two products and a sum in float32, rounded once."""
    size = expected.abs() if scale is None else scale
    bound = kit.roundoff[got.dtype] * expected.abs() + 4 * 2.0**-24 * size + kit.tiny[got.dtype]
    assert ((got.double() - expected).abs() <= 1.01 * bound).all()


@pytest.mark.parametrize("name", ROTARY)
def test_write(kit, name):
    import hf_paged_kernels as kernels
    from hf_paged_kernels.cache import rotate

    options = dict(ROTARY[name])
    interleaved = options.pop("interleaved", False)
    query, key, value, k_cache, v_cache, slots, (cos, sin) = setup(**options)
    q, k = query.double(), key.double()
    if cos is not None:
        q, k = (rotate(x, cos, sin, interleaved) for x in (q, k))
        query_out, key_out = kit.poisoned(*query.shape, dtype=query.dtype, device=DEVICE), torch.empty_like(key)
        extra = {"query": query, "query_out": query_out, "key_out": key_out, "cos": cos, "sin": sin}
    else:
        extra = {}
    want_k, want_v = expected_cache(k_cache, k, slots), expected_cache(v_cache, value.double(), slots)
    kernels.write_cache(key, value, k_cache, v_cache, slots, interleaved=interleaved, debug=True, **extra)
    reach = max(q.abs().max(), k.abs().max()) * 2
    close(kit, k_cache, want_k, reach)
    assert torch.equal(v_cache.double(), want_v)
    if cos is not None:
        close(kit, query_out, q, reach)
        close(kit, key_out, k, reach)


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place(kit, interleaved):
    """Query and key may be rotated where they lie; both come out as when they are not."""
    import hf_paged_kernels as kernels

    query, key, value, k_cache, v_cache, slots, (cos, sin) = setup(rotary=16, dtype=torch.float16)
    apart = torch.empty_like(query), torch.empty_like(key)
    common = {"cos": cos, "sin": sin, "interleaved": interleaved, "query": query}
    kernels.write_cache(key, value, k_cache, v_cache, slots, query_out=apart[0], key_out=apart[1], **common)
    first = k_cache.clone()
    kernels.write_cache(key, value, k_cache, v_cache, slots, key_out=key, **common)
    assert torch.equal(query, apart[0])
    assert torch.equal(key, apart[1])
    assert torch.equal(k_cache, first)


@pytest.mark.parametrize("rotary", [0, 32])
def test_fp8_cache(rotary):
    """Within half a step of e4m3 (3 bits of mantissa, least step 2^-9) after scaling, and clamped."""
    import hf_paged_kernels as kernels
    from hf_paged_kernels.cache import rotate

    query, key, value, _, _, slots, (cos, sin) = setup(rotary=rotary, dtype=torch.bfloat16)
    value[0, 0, 0] = 1e6
    k_cache, v_cache = (torch.zeros(4, 16, 2, 32, device=DEVICE).to(torch.float8_e4m3fn) for _ in "kv")
    k_scale, v_scale = torch.tensor([0.5, 0.25], device=DEVICE), torch.tensor([2.0], device=DEVICE)
    extra = {"cos": cos, "sin": sin, "query": query} if rotary else {}
    kernels.write_cache(key, value, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale, **extra)
    k = rotate(key.double(), cos, sin, False) if rotary else key.double()
    keep = slots >= 0
    for cache, x, scale in ((k_cache, k, k_scale), (v_cache, value.double(), v_scale)):
        got = cache.float().flatten(0, 1)[slots[keep]].double()
        want = (x[keep] / scale.double().view(-1, 1)).clamp(-448, 448)
        # The interpreter halves subnormal numbers, and loses the carry of a mantissa rounded up to a power of two.
        step, least = (2.0**-3, 2.0**-7) if DEVICE == "cpu" else (2.0**-4, 2.0**-10)
        source = 2.0**-8 * want.abs()  # the quotient may be taken from the value in the cache's own precision
        excess = (got - want).abs() - step * 1.01 * want.abs() - source - 1.01 * least
        if DEVICE == "cpu":
            excess[torch.frexp(want.abs()).mantissa >= 0.96875] = 0
        assert excess.max() <= 0, (got.flatten()[excess.argmax()], want.flatten()[excess.argmax()])
