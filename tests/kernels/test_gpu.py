"""On a GPU: real shapes, poisoned outputs, fresh random inputs each run, captured graphs, pools past 2^31 elements."""

import pytest
import torch

pytestmark = pytest.mark.gpu


def fresh_seed():
    seed = torch.seed() % 2**31
    print("seed", seed)  # shown with a failure
    return seed


def decode(kit, case, **extra):
    import hf_paged_kernels as kernels

    rows, heads, _ = case.query.shape
    size = kernels.decode_workspace_bytes(rows, heads, case.k_cache, case.v_cache)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
    out = kit.poisoned(rows, heads, case.v_cache.shape[3], dtype=case.query.dtype, device="cuda")
    kernels.decode_attention(
        case.query, case.k_cache, case.v_cache, case.block_tables, case.seq_lens, workspace, out=out,
        **case.options, **extra,
    )  # fmt: skip
    kit.check(case, out)


def prefill(kit, case, padding=7):
    import hf_paged_kernels as kernels

    query = torch.cat([case.query, case.query.new_full((padding, *case.query.shape[1:]), 5.0)])
    out = kit.poisoned(*query.shape[:2], case.v_cache.shape[3], dtype=query.dtype, device="cuda")
    kernels.prefill_attention(
        query, case.k_cache, case.v_cache, case.query_start_loc, seq_lens=case.seq_lens,
        block_tables=case.block_tables, out=out, **case.options,
    )  # fmt: skip
    kit.check(case, out)


MODELS = {
    "llama 8b": {"heads": 32, "kv_heads": 8, "dim": 128},
    "qwen2 0.5b": {"heads": 14, "kv_heads": 2, "dim": 64},
    "mistral, window": {"heads": 32, "kv_heads": 8, "dim": 128, "window": 700},
    "gemma 2": {"heads": 16, "kv_heads": 8, "dim": 256, "softcap": 50.0, "window": 512},
    "gpt-oss": {"heads": 64, "kv_heads": 8, "dim": 64, "sinks": True, "window": 128},
    "phi 3": {"heads": 32, "kv_heads": 32, "dim": 96},
    "falcon 7b": {"heads": 71, "kv_heads": 1, "dim": 64},
    "bloom": {"heads": 16, "kv_heads": 16, "dim": 64, "alibi": True},
    "fp8 cache": {"heads": 32, "kv_heads": 8, "dim": 128, "fp8": True},
    "page 64, hnd": {"heads": 32, "kv_heads": 8, "dim": 128, "page": 64, "layout": "hnd"},
    "page 32": {"heads": 32, "kv_heads": 4, "dim": 128, "page": 32},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", MODELS)
def test_decode(kit, model, dtype):
    lens = [1, 4097, 0, 517, 16, 2048, 33, 9000]
    decode(kit, kit.case(lens, device="cuda", dtype=dtype, seed=fresh_seed(), **MODELS[model]))


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_decode_batches(kit, rows):
    lens = torch.randint(0, 1500, (rows,)).tolist()
    decode(kit, kit.case(lens, device="cuda", dtype=torch.bfloat16, seed=fresh_seed(), **MODELS["llama 8b"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", MODELS)
def test_prefill(kit, model, dtype):
    """A prefill, a chunk over a prefix, decode rows, an empty row, a padded row."""
    lens, query_lens = [1000, 1700, 1, 777, 0, 129, 64], [1000, 500, 1, 1, 0, 128, 64]
    prefill(kit, kit.case(lens, query_lens=query_lens, device="cuda", dtype=dtype, seed=fresh_seed(), **MODELS[model]))


@pytest.mark.parametrize("trial", range(4))
def test_prefill_many_rows(kit, trial):
    """More pieces of work than multiprocessors, so that persistent programs take several; graph-sized padding."""
    query_lens = torch.randint(0, 200, (150,)).tolist()
    lens = [n + int(torch.randint(0, 400, ())) * (n % 2) for n in query_lens]
    case = kit.case(
        lens, query_lens=query_lens, device="cuda", dtype=torch.bfloat16, seed=fresh_seed(), **MODELS["llama 8b"]
    )
    prefill(kit, case, padding=300)


@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (64, 2), (48, 8)])
@pytest.mark.parametrize("dim", [64, 128])
def test_prefill_contiguous(kit, heads, dim):
    """Keys beside the query, in slices of one merged projection; a NaN in one row must not reach another."""
    import hf_paged_kernels as kernels

    lens = [300, 1, 0, 513, 128]
    options = {"device": "cuda", "dtype": torch.bfloat16, "heads": heads[0], "kv_heads": heads[1], "dim": dim}
    case = kit.case(lens, query_lens=lens, seed=fresh_seed(), **options)
    tokens, kv = sum(lens), heads[1] * dim
    merged = torch.full((tokens + 9, 2 * kv), float("nan"), device="cuda", dtype=torch.bfloat16)
    key, value = merged[:, :kv].view(-1, heads[1], dim), merged[:, kv:].view(-1, heads[1], dim)
    key[:tokens], value[:tokens] = (torch.cat(x) for x in zip(*[case.row(r) for r in range(len(lens))], strict=True))
    query = torch.cat([case.query, case.query[:9]])
    out = kit.poisoned(tokens + 9, heads[0], dim, dtype=torch.bfloat16, device="cuda")
    kernels.prefill_attention(query, key, value, case.query_start_loc, out=out, **case.options)
    kit.check(case, out)


def test_one_graph_serves_any_batch(kit):
    """A captured decode step and prefill, replayed on other lengths, tables and tokens, equal fresh launches."""
    import hf_paged_kernels as kernels

    rows, heads = 24, 32
    options = {"device": "cuda", "dtype": torch.bfloat16, **MODELS["llama 8b"]}
    first = kit.case([40] * rows, extra_blocks=1200, seed=fresh_seed(), **options)
    table = torch.zeros(rows, 300, dtype=torch.int32, device="cuda")
    lens = first.seq_lens.clone()
    table[:, : first.block_tables.shape[1]] = first.block_tables
    size = kernels.decode_workspace_bytes(rows, heads, first.k_cache, first.v_cache)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
    out, flat_out = torch.empty_like(first.query), torch.empty_like(first.query)
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    pools = (first.k_cache, first.v_cache)

    def step():
        kernels.decode_attention(first.query, *pools, table, lens, workspace, scale=0.1, out=out)
        kernels.prefill_attention(
            first.query, *pools, starts, seq_lens=lens, block_tables=table, scale=0.1, out=flat_out
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for pool in pools:
        pool.nan_to_num_()  # all blocks come into use
    for longest in (4000, 3, 700):
        lens.copy_(torch.randint(0, longest, (rows,), device="cuda"))
        table.copy_(torch.randint(1, first.k_cache.shape[0], table.shape, device="cuda"))
        out.fill_(float("nan"))
        flat_out.fill_(float("nan"))
        graph.replay()
        case = type(first)(first.query, *pools, table, lens, [1] * rows, {"scale": 0.1, "window": 0, "softcap": 0.0})
        kit.check(case, out)
        # Rows of length 0 with a query token: zeros, as in decode.
        kit.check(case, flat_out)


def test_pool_past_32_bits():
    """Offsets into the pool need 64 bits: the last blocks of a pool of 2.4e9 elements."""
    import hf_paged_kernels as kernels

    blocks, heads, dim = 146_000, 8, 128
    pools = [torch.zeros(blocks, 16, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in "kv"]
    assert pools[0].numel() > 2**31
    key, value = (torch.randn(40, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    slots = torch.arange(40, device="cuda") + (blocks - 3) * 16
    kernels.write_cache(key, value, *pools, slots)
    assert torch.equal(pools[0].flatten(0, 1)[slots[0] : slots[0] + 40], key)
    table = torch.tensor([[blocks - 3, blocks - 2, blocks - 1]], dtype=torch.int32, device="cuda")
    lens = torch.tensor([40], dtype=torch.int32, device="cuda")
    query = torch.randn(40, 32, dim, dtype=torch.bfloat16, device="cuda")
    starts = torch.tensor([0, 40], dtype=torch.int32, device="cuda")
    expected = kernels.prefill_attention(query, key, value, starts, scale=0.1, impl="torch")
    paged = {"seq_lens": lens, "block_tables": table, "scale": 0.1}
    close = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(kernels.prefill_attention(query, *pools, starts, **paged), expected, **close)
    general = kernels.prefill_attention(query, *pools, starts, window=1000, **paged)
    torch.testing.assert_close(general, expected, **close)
    workspace = torch.zeros(kernels.decode_workspace_bytes(1, 32, *pools), dtype=torch.uint8, device="cuda")
    last = kernels.decode_attention(query[-1:], *pools, table, lens, workspace, scale=0.1)
    torch.testing.assert_close(last, expected[-1:], **close)
    pairs = torch.tensor([[blocks - 2, 1], [blocks - 3, blocks - 1]], device="cuda")
    kernels.copy_blocks(pools, pairs)
    assert torch.equal(pools[1][1], pools[1][blocks - 2])


def test_sampling_at_full_vocabulary():
    """128,256 tokens, every filter: the kept sets of a sort, and draws within float32's error of the best."""
    import hf_paged_kernels as kernels
    from hf_paged_kernels import reference

    rows, vocab = 48, 128256
    logits = torch.randn(rows, vocab, device="cuda") * 4
    options = {
        "temperature": torch.rand(rows, device="cuda") * 1.5 + 0.1,
        "top_k": torch.randint(0, 2000, (rows,), dtype=torch.int32, device="cuda"),
        "top_p": torch.rand(rows, device="cuda"),
        "min_p": torch.rand(rows, device="cuda") * 0.01,
    }
    seeds, positions = (torch.randint(0, 2**40, (rows,), device="cuda") for _ in "sp")
    got = kernels.sample(logits, seeds=seeds, positions=positions, **options)
    keep = reference.kept_logits(logits, **options)
    noisy = logits.double() / options["temperature"][:, None] + reference.gumbel(seeds, positions, vocab)
    noisy = noisy.masked_fill(~keep, float("-inf"))
    picked = noisy.gather(1, got[:, None])[:, 0]
    # A mass within float32's error of top_p may move the threshold by a token; a draw of it would read as -inf here.
    assert (picked >= noisy.max(1).values - 1e-3).float().mean() > 0.95
    assert torch.equal(kernels.argmax(logits), logits.argmax(1))
