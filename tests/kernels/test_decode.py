"""Paged decode attention against float64, feature by feature, and its plan."""

import pytest
import torch

DEVICES = ["cpu"] if not torch.cuda.is_available() else ["cuda"]
FEATURES = {
    "plain": {},
    "one kv head": {"heads": 5, "kv_heads": 1},
    "no groups": {"heads": 3, "kv_heads": 3},
    "groups of 3": {"heads": 6, "kv_heads": 2},
    "17 heads a group": {"heads": 17, "kv_heads": 1},
    "head dim 80": {"dim": 80},
    "head dim 96": {"dim": 96, "dtype": torch.bfloat16},
    "head dim 256": {"dim": 256, "dtype": torch.bfloat16},
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
    "sinks and window in bf16": {"dtype": torch.bfloat16, "sinks": True, "window": 40},
}


def run(kit, case, **extra):
    import hf_paged_kernels as kernels

    rows, heads, _ = case.query.shape
    device = case.query.device
    size = kernels.decode_workspace_bytes(rows, heads, case.k_cache, case.v_cache)
    workspace = torch.zeros(size, dtype=torch.uint8, device=device)
    results = []
    for _ in range(2):  # the second launch finds the counters as the first left them
        out = kit.poisoned(rows, heads, case.v_cache.shape[3], dtype=case.query.dtype, device=device)
        kernels.decode_attention(
            case.query, case.k_cache, case.v_cache, case.block_tables, case.seq_lens, workspace, out=out,
            **case.options, **extra,
        )  # fmt: skip
        kit.check(case, out)
        results.append(out)
    assert torch.equal(*results), "the same step gave two results"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(kit, name, device):
    """Lengths around tile and page edges, an empty row, and one long enough to be split and merged."""
    lens = [1, 16, 0, 67, 200 if device == "cpu" else 3000]
    run(kit, kit.case(lens, device=device, seed=len(name), **FEATURES[name]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(6))
def test_random_lengths(kit, seed, device):
    generator = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 9, (), generator=generator))
    lens = torch.randint(0, 300, (rows,), generator=generator).tolist()
    run(kit, kit.case(lens, device=device, seed=seed, heads=4, kv_heads=1 + seed % 2))


@pytest.mark.parametrize("seed", range(8))
def test_plan_covers_each_key_once(seed):
    """Work items tile every row's visible keys, number their row's items rightly, and fit the fixed grid."""
    import hf_paged_kernels as kernels

    device = DEVICES[0]
    generator = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 40, (), generator=generator))
    lens = torch.randint(0, 5000 if seed % 2 else 60, (rows,), generator=generator)
    window = 0 if seed < 4 else 37
    cache = torch.zeros(2, 16, 2, 32, device=device)
    workspace = torch.zeros(kernels.decode_workspace_bytes(rows, 4, cache, cache), dtype=torch.uint8, device=device)
    kernels.plan_decode(lens.int().to(device), workspace, cache, cache, window=window)
    from hf_paged_kernels.heuristics import decode_plan_shape

    shape = decode_plan_shape(rows, 2, 32, 32, 4, torch.device(device))
    plan = workspace[: (rows + shape.target) * 32].view(torch.int32).view(-1, 8).tolist()
    work = [entry for entry in plan if entry[0] >= 0]
    assert work == plan[: len(work)]
    for row, length in enumerate(lens.tolist()):
        mine = [(i, e) for i, e in enumerate(work) if e[0] == row]
        at = max(0, length - window) if window else 0
        assert all(e[3] == mine[0][0] and e[4] == len(mine) and e[5] == length for _, e in mine)
        for _, (_, start, stop, *_) in mine:
            assert start == at
            assert stop > start or length == 0
            at = stop
        assert at == length


def test_torch_reference_is_the_same_function(kit):
    import hf_paged_kernels as kernels

    case = kit.case([5, 0, 40], window=9, sinks=True, softcap=2.0)
    out = kernels.decode_attention(
        case.query, case.k_cache, case.v_cache, case.block_tables, case.seq_lens, impl="torch", **case.options
    )
    kit.check(case, out)
