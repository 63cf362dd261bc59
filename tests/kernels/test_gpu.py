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


def test_sampling_at_full_vocabulary():
    """128,256 tokens, every filter: the kept sets of a sort, and draws within float32's error of the best."""
    import hf_paged_kernels as kernels
    from hf_paged_kernels.filters import kept_logits
    from hf_paged_kernels.sampling import gumbel

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
    keep = kept_logits(logits, **options)
    noisy = logits.double() / options["temperature"][:, None] + gumbel(seeds, positions, vocab)
    noisy = noisy.masked_fill(~keep, float("-inf"))
    picked = noisy.gather(1, got[:, None])[:, 0]
    # A mass within float32's error of top_p may move the threshold by a token; a draw of it would read as -inf here.
    assert (picked >= noisy.max(1).values - 1e-3).float().mean() > 0.95
    assert torch.equal(kernels.argmax(logits), logits.argmax(1))


def linear_case(tokens, n, k, *, gate=None, norm=False, bias=False, residual=False, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(fresh_seed())

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)

    options = {"gate": gate}
    if norm:
        options |= {"norm_weight": rand(k), "eps": 1e-5}
    if bias:
        options["bias"] = rand(n if gate is None else 2 * n)
    if residual:
        options["residual"] = rand(tokens, n)
    return rand(tokens, k), rand(n if gate is None else 2 * n, k, scale=k**-0.5), options


def check_linear(kit, x, weight, options, out):
    """Against float64 in torch, within what bfloat16's roundings of a normed x and of the result explain."""
    assert not out.isnan().any()
    x64 = x.double()
    u = kit.roundoff[x.dtype]
    if (w := options.get("norm_weight")) is not None:
        x64 = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + options["eps"]) * w.double()
    y, size = x64 @ weight.double().T, x64.abs() @ weight.double().abs().T
    off = size * (2.0**-23 * x.shape[1] + (0 if w is None else 2.02 * u))
    if options.get("bias") is not None:
        y = y + options["bias"].double()
    if options["gate"] is not None:
        (g, up), (g_off, up_off) = y.chunk(2, -1), off.chunk(2, -1)
        y, a_off = torch.nn.functional.silu(g) * up, 1.2 * g_off + 2.0**-20 * g.abs()
        off = a_off * (up.abs() + up_off) + torch.nn.functional.silu(g).abs() * up_off
    if options.get("residual") is not None:
        y = y + options["residual"].double()
    worst = ((out.double() - y).abs() / (off * 1.01 + 1.01 * u * y.abs() + 1e-6)).max().item()
    assert worst <= 1, f"{worst:.2f} times its error budget"


@pytest.mark.parametrize("tokens", [1, 7, 8, 13, 16, 31, 64, 65, 100, 128, 192, 300, 1025])
@pytest.mark.parametrize(
    ("n", "k", "features"),
    [
        (6144, 4096, {"norm": True}),
        (4096, 4096, {"residual": True}),
        (14336, 4096, {"norm": True, "gate": "silu"}),
        (4096, 14336, {"residual": True, "bias": True}),  # two programs share its K
        (4104, 4104, {"bias": True, "residual": True, "norm": True}),  # tails everywhere
        (3336, 200, {"bias": True, "residual": True}),  # for many tokens large tiles, the last nearly empty
        (4100, 4104, {"bias": True, "residual": True}),  # the copy engine takes no such rows of results
        (1000, 200, {"gate": "silu", "bias": True, "residual": True}),
        (72, 8, {}),
        (513, 129, {"gate": "silu", "norm": True}),  # rows that the copy engine does not take: the portable kernel
    ],
)
def test_linear(kit, n, k, features, tokens):
    import hf_paged_kernels as kernels

    dtype = torch.float16 if tokens == 7 else torch.bfloat16
    x, weight, options = linear_case(tokens, n, k, dtype=dtype, **features)
    out = kit.poisoned(tokens, n, dtype=dtype, device="cuda")
    kernels.linear(x, weight, out=out, **options)
    check_linear(kit, x, weight, options, out)
    if options.get("residual") is not None:
        kernels.linear(x, weight, **options | {"out": options["residual"]})
        assert torch.equal(options["residual"], out)


class Chain:
    """Layers of a decode step, each kernel reading what the one before wrote; small, so that kernels are short."""

    def __init__(self, rows, layers=6, hidden=512, heads=8, kv_heads=2, dim=64, vocab=4096):
        def rand(*shape, scale=1.0):
            return (torch.randn(*shape, device="cuda") * scale).bfloat16()

        self.rows, self.heads, self.kv_heads, self.dim = rows, heads, kv_heads, dim
        width = (heads + 2 * kv_heads) * dim
        self.layers = [
            {
                "norms": [rand(hidden), rand(hidden)],
                "qkv": rand(width, hidden, scale=hidden**-0.5),
                "o": rand(hidden, heads * dim, scale=hidden**-0.5),
                "gate_up": rand(4096, hidden, scale=hidden**-0.5),
                "down": rand(hidden, 2048, scale=2048**-0.5),
                "caches": (rand(rows * 8 + 1, 16, kv_heads, dim), rand(rows * 8 + 1, 16, kv_heads, dim)),
            }
            for _ in range(layers)
        ]
        self.head = rand(vocab, hidden, scale=hidden**-0.5)
        self.tokens = rand(vocab, hidden)
        self.ids = torch.randint(0, vocab, (rows,), device="cuda")
        self.lens = torch.randint(1, 120, (rows,), dtype=torch.int32, device="cuda")
        self.table = (torch.randperm(rows * 8, device="cuda") + 1).view(rows, 8).int()
        self.cos, self.sin = torch.rand(rows, dim // 2, device="cuda"), torch.rand(rows, dim // 2, device="cuda")

    def run(self, fuse, after=lambda: None):
        """Ids of one step from the ids, greedily; `after` each kernel. `fuse`: norms and activations in `linear`."""
        import hf_paged_kernels as kernels

        spare = torch.zeros(64, device="cuda")  # a memset and a copy among the kernels, as torch's allocations bring
        at = self.lens.long() - 1
        slots = self.table.gather(1, (at // 16)[:, None])[:, 0].long() * 16 + at % 16
        first = self.layers[0]["caches"]
        size = kernels.decode_workspace_bytes(self.rows, self.heads, *first)
        workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        kernels.plan_decode(self.lens, workspace, *first)
        hidden = self.tokens[self.ids]
        spare.copy_(spare.clone())

        def linear(x, weight, norm=None, **options):
            if norm is not None and not fuse:
                x = kernels.rms_norm(x, norm, eps=1e-5)
                after()
            elif norm is not None:
                options |= {"norm_weight": norm, "eps": 1e-5}
            y = kernels.linear(x, weight, **options)
            after()
            return y

        for layer in self.layers:
            qkv = linear(hidden, layer["qkv"], layer["norms"][0]).view(self.rows, -1, self.dim)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
            kernels.write_cache(k, v, *layer["caches"], slots, query=q, cos=self.cos, sin=self.sin)
            after()
            y = kernels.decode_attention(
                q, *layer["caches"], self.table, self.lens, workspace, scale=self.dim**-0.5, planned=True
            )
            after()
            linear(y.view(self.rows, -1), layer["o"], residual=hidden, out=hidden)
            act = linear(hidden, layer["gate_up"], layer["norms"][1], gate="silu")
            linear(act, layer["down"], residual=hidden, out=hidden)
        logits = linear(hidden, self.head, self.layers[0]["norms"][0])
        ids = kernels.argmax(logits)
        after()
        return ids, logits


@pytest.mark.parametrize("rows", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("fuse", [True, False])
def test_kernels_that_overlap_wait_for_each_other(rows, fuse):
    """A captured decode step, replayed back to back, gives bit for bit what kernels give that run one by one."""
    chain = Chain(rows)
    chain.run(fuse)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, logits = chain.run(fuse)
        chain.ids.copy_(ids)
    for _ in range(3):
        first = torch.randint(0, 4096, (rows,), device="cuda")
        chain.ids.copy_(first)
        wanted = []
        for _ in range(20):
            new_ids, new_logits = chain.run(fuse, after=torch.cuda.synchronize)
            wanted.append(new_logits)
            chain.ids.copy_(new_ids)
        chain.ids.copy_(first)
        torch.cuda.synchronize()
        got = []
        for _ in range(20):
            graph.replay()
            got.append(logits.clone())
        for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert torch.equal(a, b), f"step {step}"
