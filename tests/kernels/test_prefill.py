"""Variable-length attention against float64: prefill, chunks over a prefix, decode rows among them, padding."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = {
    "prefill": ([37, 5, 80], [37, 5, 80]),
    "chunk over a prefix": ([90], [33]),
    "mixed": ([50, 70, 1, 33, 0, 40], [1, 20, 1, 1, 0, 40]),
    "padded rows": ([20, 0, 0, 0], [20, 0, 0, 0]),
}
FEATURES = {
    "plain": {},
    "groups of 3": {"heads": 6, "kv_heads": 2},
    "40 heads a group": {"heads": 40, "kv_heads": 1},
    "head dim 80": {"dim": 80},
    "head dim 96, bf16": {"dim": 96, "dtype": torch.bfloat16},
    "head dim 256, bf16": {"dim": 256, "dtype": torch.bfloat16},
    "value dim differs": {"dim": 48, "v_dim": 32},
    "value dim larger": {"dim": 32, "v_dim": 80},
    "page 32": {"page": 32},
    "page 64": {"page": 64},
    "hnd": {"layout": "hnd"},
    "window": {"window": 21},
    "window of one": {"window": 1},
    "soft-cap": {"softcap": 2.0, "scale": 0.6},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "all together": {"window": 30, "softcap": 3.0, "sinks": True, "alibi": True, "scale": 0.4},
    "fp16": {"dtype": torch.float16},
    "bf16": {"dtype": torch.bfloat16},
    "fp8 cache": {"dtype": torch.bfloat16, "fp8": True},
    "fp8 cache, fp16 query": {"dtype": torch.float16, "fp8": True},
}


def run(kit, case, padding=0):
    import hf_paged_kernels as kernels

    if padding:
        junk = torch.full_like(case.query[:1], 3.0).expand(padding, -1, -1)
        query = torch.cat([case.query, junk])
    else:
        query = case.query
    out = kit.poisoned(*query.shape[:2], case.v_cache.shape[3], dtype=query.dtype, device=query.device)
    kernels.prefill_attention(
        query, case.k_cache, case.v_cache, case.query_start_loc, seq_lens=case.seq_lens,
        block_tables=case.block_tables, out=out, **case.options,
    )  # fmt: skip
    kit.check(case, out)


@pytest.mark.parametrize("name", BATCHES)
def test_batch(kit, name):
    lens, query_lens = BATCHES[name]
    run(kit, kit.case(lens, query_lens=query_lens, device=DEVICE), padding=3)


@pytest.mark.parametrize("name", FEATURES)
def test_feature(kit, name):
    run(kit, kit.case([50, 70, 33, 0], query_lens=[1, 41, 33, 0], device=DEVICE, seed=len(name), **FEATURES[name]))


@pytest.mark.parametrize("seed", range(4))
def test_random_batches(kit, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 6, (), generator=generator))
    query_lens = torch.randint(0, 60, (rows,), generator=generator).tolist()
    prefix = torch.randint(0, 80, (rows,), generator=generator).tolist()
    lens = [a + b for a, b in zip(query_lens, prefix, strict=True)]
    run(kit, kit.case(lens, query_lens=query_lens, device=DEVICE, seed=seed, window=[0, 25][seed % 2]), padding=seed)


def contiguous(kit, case, lens):
    """The same rows with keys and values beside the query, as slices of one merged tensor."""
    import hf_paged_kernels as kernels

    dim, v_dim = case.k_cache.shape[3], case.v_cache.shape[3]
    kv_heads = case.k_cache.shape[2]
    rows = [case.row(r) for r in range(len(lens))]
    merged = torch.zeros(sum(lens), kv_heads * (dim + v_dim), device=case.query.device, dtype=case.query.dtype)
    key = merged[:, : kv_heads * dim].view(-1, kv_heads, dim)
    value = merged[:, kv_heads * dim :].view(-1, kv_heads, v_dim)
    key.copy_(torch.cat([k for k, _ in rows]))
    value.copy_(torch.cat([v for _, v in rows]))
    out = kit.poisoned(*case.query.shape[:2], v_dim, dtype=case.query.dtype, device=case.query.device)
    kernels.prefill_attention(case.query, key, value, case.query_start_loc, out=out, **case.options)
    kit.check(case, out)


@pytest.mark.parametrize("name", ["plain", "head dim 80", "value dim differs", "window", "bf16", "all together"])
def test_contiguous_keys(kit, name):
    lens = [37, 5, 80]
    contiguous(kit, kit.case(lens, query_lens=lens, device=DEVICE, seed=3, **FEATURES[name]), lens)


def test_no_tokens(kit):
    run(kit, kit.case([0, 0], query_lens=[0, 0], device=DEVICE))


def test_torch_reference_is_the_same_function(kit):
    import hf_paged_kernels as kernels

    case = kit.case([50, 20], query_lens=[9, 20], softcap=2.0, sinks=True, alibi=True)
    out = kernels.prefill_attention(
        case.query, case.k_cache, case.v_cache, case.query_start_loc, seq_lens=case.seq_lens,
        block_tables=case.block_tables, impl="torch", **case.options,
    )  # fmt: skip
    kit.check(case, out)
