"""Batch invariance: a row has the same bits whatever is beside it. Without a GPU: that nothing but bits changes."""

from itertools import pairwise

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COUNTS = (1, 2, 7, 8, 9, 16, 31, 33, 64, 65, 100, 128, 129, 300, 1024)


def rand(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (1000, 72), (1002, 72)])
@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh"])
def test_linear_rows(dtype, n, k, gate):
    """With all that an engine asks for; 1002 (501 behind a gate) is nothing for the copy engine to write."""
    import hf_paged_kernels as kernels

    x, weight = rand(max(COUNTS), k, dtype=dtype), rand(n, k, dtype=dtype, scale=k**-0.5)
    residual = rand(max(COUNTS), n, dtype=dtype)
    options = {"gate": gate, "norm_weight": rand(k, dtype=dtype), "eps": 1e-5, "bias": rand(n, dtype=dtype)}

    def linear(first, last):
        total = residual[first:last].clone() if gate is None else None
        return kernels.linear(x[first:last].clone(), weight, residual=total, out=total, invariant=True, **options)

    whole = linear(0, max(COUNTS))
    for count in COUNTS:
        for first in {0, max(COUNTS) - count}:
            some = linear(first, first + count)
            assert torch.equal(some, whole[first : first + count]), f"{count} rows from {first}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [128, 576, 4096])
def test_norm_rows(dtype, n):
    import hf_paged_kernels as kernels

    x, weight = rand(5000, n, dtype=dtype), rand(n, dtype=dtype)
    whole = kernels.rms_norm(x, weight, eps=1e-6, invariant=True)
    for count in COUNTS:
        assert torch.equal(kernels.rms_norm(x[-count:].clone(), weight, eps=1e-6, invariant=True), whole[-count:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("extra", [{}, {"window": 100}, {"softcap": 20.0}, {"sinks": True}])
def test_attention_whole_in_chunks_and_token_by_token(dtype, dim, extra):
    import hf_paged_kernels as kernels

    length, heads, kv_heads, page = 700, 8, 2, 16
    pages = -(-length // page)
    keys, values = (rand(pages + 1, page, kv_heads, dim, dtype=dtype) for _ in range(2))
    table = (torch.randperm(pages, device=DEVICE) + 1).int()[None]
    query = rand(length, heads, dim, dtype=dtype)
    if "sinks" in extra:
        extra = {"sinks": rand(heads, dtype=dtype)}

    def attend(*rows):
        """Stretches (first, last) of the sequence, each a row of the batch."""
        starts = torch.tensor([0, *(b - a for a, b in rows)], device=DEVICE).cumsum(0).int()
        own = torch.cat([query[a:b] for a, b in rows])
        lengths = torch.tensor([b for _, b in rows], dtype=torch.int32, device=DEVICE)
        paged = {"seq_lens": lengths, "block_tables": table.expand(len(rows), -1).contiguous()}
        out = kernels.prefill_attention(own, keys, values, starts, scale=dim**-0.5, invariant=True, **paged, **extra)
        return out.split([b - a for a, b in rows])

    (whole,) = attend((0, length))
    assert torch.equal(torch.cat(attend(*pairwise([0, 1, 17, 64, 65, 190, 191, 512, 700]))), whole)
    for position in (0, 5, 63, 64, 255, 256, 699):
        others = [(i, i + 1) for i in range(3, 300, 7)]
        assert torch.equal(attend(*others, (position, position + 1))[-1], whole[position : position + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_changes_but_bits(dtype):
    import hf_paged_kernels as kernels

    x, weight, norm = rand(5, 48, dtype=dtype), rand(32, 48, dtype=dtype), rand(48, dtype=dtype)
    expected = torch.nn.functional.rms_norm(x.float(), (48,), eps=1e-5).to(dtype) * norm
    torch.testing.assert_close(kernels.rms_norm(x, norm, eps=1e-5, invariant=True), expected, atol=2e-2, rtol=2e-2)
    got = kernels.linear(x, weight, norm_weight=norm, eps=1e-5, invariant=True)
    wanted = expected.double() @ weight.double().T
    assert (got.double() - wanted).norm() <= (3e-2 if dtype == torch.bfloat16 else 1e-6) * wanted.norm()


def test_attention_without_tables_is_refused():
    import hf_paged_kernels as kernels

    x, starts = rand(4, 2, 32), torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="needs block_tables"):
        kernels.prefill_attention(x, x.clone(), x.clone(), starts, scale=0.2, invariant=True)
