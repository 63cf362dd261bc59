"""Cases and error budgets for the kernel tests. Without a GPU the kernels run under Triton's interpreter, small.

A budget bounds what rounding may do to a result, elementwise, from quantities computed in float64: a kernel that leaves
it computes something else. It isn't fitted to what the kernels happen to give.
"""

import math
import os
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when the kernels are defined: before they are imported
    torch.set_num_threads(1)

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
if not torch.cuda.is_available():
    ROUNDOFF[torch.bfloat16] = 2.0**-7  # the interpreter cuts bfloat16 off instead of rounding it
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-133, torch.float64: 0.0}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@dataclass
class Case:
    """Arguments of a paged attention, its rows' query lengths, and the float64 result with its budget."""

    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_lens: list[int]
    options: dict

    @property
    def query_start_loc(self) -> torch.Tensor:
        starts = [0]
        for n in self.query_lens:
            starts.append(starts[-1] + n)
        return torch.tensor(starts, dtype=torch.int32, device=self.query.device)

    def row(self, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row r's keys and values in float64, scaled."""
        from hf_paged_kernels import attention

        length = int(self.seq_lens[r])
        out = []
        for cache, name in ((self.k_cache, "k_scale"), (self.v_cache, "v_scale")):
            x = attention.gather_pages(cache, self.block_tables[r], length)
            x = x.float().double() if x.element_size() == 1 else x.double()
            scale = self.options.get(name)
            out.append(x if scale is None else x * scale.double().view(-1, 1))
        return out[0], out[1]


def _page_pool(blocks, page, heads, dim, layout, dtype, device, generator):
    if layout == "nhd":
        x = torch.randn(blocks, page, heads, dim, device=device, generator=generator)
    else:
        x = torch.randn(blocks, heads, page, dim, device=device, generator=generator).transpose(1, 2)
    return x.to(dtype)


def build_case(
    lens, *, query_lens=None, heads=4, kv_heads=2, dim=32, v_dim=None, page=16, dtype=torch.float32, fp8=False,
    layout="nhd", device="cpu", seed=0, window=0, softcap=0.0, sinks=False, alibi=False, scale=None, extra_blocks=3,
):  # fmt: skip
    """Random paged attention arguments: shuffled blocks, poisoned where no row may look, in any layout."""
    generator = torch.Generator(device).manual_seed(seed)
    v_dim = v_dim or dim
    query_lens = [1] * len(lens) if query_lens is None else query_lens
    used = [-(-n // page) for n in lens]
    blocks = 1 + sum(used) + extra_blocks
    cache_dtype = torch.float8_e4m3fn if fp8 else dtype
    pools = [_page_pool(blocks, page, kv_heads, d, layout, cache_dtype, device, generator) for d in (dim, v_dim)]
    order = (torch.randperm(blocks - 1, device=device, generator=generator) + 1).tolist()
    table = torch.zeros(len(lens), max(used, default=0) + 2, dtype=torch.int32)  # padded with the null block
    for r, n in enumerate(used):
        table[r, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)
    for pool in pools:
        raw = pool.view(torch.uint8) if fp8 else pool
        raw[0] = 127 if fp8 else math.nan  # 127 is e4m3's NaN
        for b in order:
            raw[b] = 127 if fp8 else math.nan
    query = torch.randn(sum(query_lens), heads, dim, device=device, generator=generator).to(dtype)
    options = {"scale": scale or dim**-0.5, "window": window, "softcap": softcap}
    if sinks:
        options["sinks"] = torch.randn(heads, device=device, generator=generator).to(dtype)
    if alibi:
        options["alibi_slopes"] = torch.rand(heads, device=device, generator=generator) * 0.2
    if fp8:
        options["k_scale"] = torch.rand(kv_heads, device=device, generator=generator) + 0.5
        options["v_scale"] = torch.rand(1, device=device, generator=generator) + 0.5
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    return Case(query, *pools, table.to(device), seq_lens, query_lens, options)


def attention_budget(q, k, v, options, out_dtype, operand_dtype):
    """(expected, bound) of one row, float64. q [n, heads, dim], k and v as the row's keys, all float64.

    Weights are off by the rounding of p to the operand's dtype, and by the error e of a float32 score, which the
    exponential turns into a factor exp(+-2 e) with the denominator; the output by its own rounding.
    """
    from hf_paged_kernels import attention

    shaped = {name: options.get(name) for name in ("window", "softcap", "sinks", "alibi_slopes")}
    shaped = {name: x.double() if isinstance(x, torch.Tensor) else x or 0 for name, x in shaped.items()}
    for name in ("sinks", "alibi_slopes"):
        if not isinstance(shaped[name], torch.Tensor):
            shaped[name] = None
    expected = attention.attend(q, k, v, options["scale"], **shaped)
    absolute = attention.attend(q, k, v.abs(), options["scale"], **shaped)
    reach = q.abs().sum(-1).max() * k.abs().max() * options["scale"] if q.numel() else torch.tensor(0.0)
    if shaped["alibi_slopes"] is not None:
        reach = reach + shaped["alibi_slopes"].max() * k.shape[0]
    score_error = (reach + 8) * 2.0**-22
    bound = absolute * (ROUNDOFF[operand_dtype] + 2 * score_error + 2.0**-20) + ROUNDOFF[out_dtype] * expected.abs()
    return expected, bound * 1.01 + 2 * TINY[out_dtype]


def check_attention(case: Case, out: torch.Tensor) -> None:
    """Every element of `out` [tokens, heads, v_dim] is within its budget, row by row; nothing is left unwritten."""
    assert not out.isnan().any(), "an element was left unwritten, or a poisoned block was read"
    start = 0
    for r, n in enumerate(case.query_lens):
        got = out[start : start + n].double()
        q = case.query[start : start + n].double()
        start += n
        if not int(case.seq_lens[r]):
            assert (got == 0).all(), f"row {r} has no keys, so it must be zeros"
            continue
        expected, bound = attention_budget(q, *case.row(r), case.options, out.dtype, case.query.dtype)
        worst = ((got - expected).abs() / bound.clamp_min(1e-300)).max().item() if n else 0.0
        assert worst <= 1, f"row {r}: {worst:.2f} times its error budget"
    assert (out[start:] == 0).all(), "tokens behind the last row must be zeros"


def poisoned(*shape, dtype, device="cpu"):
    return torch.full(shape, math.nan, dtype=dtype, device=device)


@pytest.fixture
def kit():
    """The helpers above, for tests that pytest imports without a package."""

    class Kit:
        roundoff = ROUNDOFF
        tiny = TINY

    Kit.case, Kit.check, Kit.poisoned = staticmethod(build_case), staticmethod(check_attention), staticmethod(poisoned)
    return Kit
