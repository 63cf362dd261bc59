"""Sampling: the filters' sets, the distribution, the generator, and independence of the batch."""

import math

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(rows, vocab, seed=0, dtype=torch.float32):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = (torch.randn(rows, vocab, device=DEVICE, generator=generator) * 3).to(dtype)
    seeds = torch.randint(-(2**62), 2**62, (rows,), device=DEVICE, generator=generator)
    positions = torch.randint(0, 2**40, (rows,), device=DEVICE, generator=generator)
    return logits, seeds, positions


def floats(*values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 37, 5000])
def test_argmax(vocab, dtype):
    """The first of equals; minus infinity loses to everything, and a row of nothing else gives its first token."""
    import hf_paged_kernels as kernels

    logits, _, _ = batch(5, vocab, dtype=dtype)
    logits[0] = -math.inf
    logits[1] = 1.0
    logits[2, vocab // 2 :] = 50.0
    expected = (logits == logits.max(1, keepdim=True).values).int().argmax(1)
    assert torch.equal(kernels.argmax(logits), expected)
    assert torch.equal(kernels.argmax(logits, impl="torch"), expected)


def test_philox():
    """Known answers of Philox-4x32-10 (Random123's kat_vectors: zeros; ones)."""
    from hf_paged_kernels.sampling import philox

    zero, ones = torch.tensor([0]), torch.tensor([-1])
    assert philox(zero, zero, zero).item() == 0x6627E8D5
    assert 0 <= philox(ones, zero, ones).item() < 2**32


@pytest.mark.parametrize("seed", range(4))
def test_same_draw_as_the_reference(seed):
    """The kernel's token has, in float64, a noisy logit equal to the best of the kept ones within float32's error."""
    import hf_paged_kernels as kernels
    from hf_paged_kernels.filters import kept_logits
    from hf_paged_kernels.sampling import gumbel

    logits, seeds, positions = batch(6, 700, seed)
    options = {
        "temperature": floats(1.0, 0.0, 0.3, 2.0, 1.0, 5.0),
        "top_k": torch.tensor([0, 3, 5, 50, 1, 700], dtype=torch.int32, device=DEVICE),
        "top_p": floats(1.0, 0.5, 0.9, 0.7, 0.2, 0.99),
        "min_p": floats(0.0, 0.0, 0.1, 0.0, 0.0, 0.02),
    }
    got = kernels.sample(logits, seeds=seeds, positions=positions, **options)
    keep = kept_logits(logits, **options)
    assert got[1] == logits[1].argmax()
    noisy = logits.double() / options["temperature"].clamp_min(1e-9)[:, None] + gumbel(seeds, positions, 700)
    noisy = noisy.masked_fill(~keep, -math.inf)
    for r in (0, 2, 3, 4, 5):
        assert keep[r, got[r]]
        assert noisy[r, got[r]] >= noisy[r].max() - 1e-4
    again = kernels.sample(logits, seeds=seeds, positions=positions, impl="torch", **options)
    assert (again == got).sum() >= 5  # they could part only where two noisy logits lie within 1e-4


@pytest.mark.parametrize(("vocab", "gathers"), [(50, True), (900, True), (900, False)])
def test_thresholds(vocab, gathers, monkeypatch):
    """The kept set is exactly that of a sort, from gathered logits as from the whole row."""
    from hf_paged_kernels import filters

    logits, _, _ = batch(8, vocab, 5)
    logits[0] = logits[0].round()  # ties
    logits[1, 1:] = -math.inf
    options = {
        "temperature": floats(1, 1, 0.5, 2, 1, 1, 1, 0.7),
        "top_k": torch.tensor([7, 4, 1, vocab, 0, 20, 9, 33], dtype=torch.int32, device=DEVICE),
        "top_p": floats(1, 0.5, 0.9, 0.9, 0.3, 1, 0.98, 0.8),
        "min_p": floats(0, 0, 0, 0, 0, 0.3, 0, 0.01),
    }
    if not gathers:
        monkeypatch.setattr(filters, "REACH", 0)
    keep = filters.kept_logits(logits, **options)
    least = torch.empty(8, device=DEVICE)
    filters.thresholds(logits, least, **options)
    got = (logits >= least[:, None]) & (logits > -math.inf)
    assert torch.equal(got, keep)


def test_distribution():
    """Draws at many positions follow the softmax: chi-squared under its 1e-6 quantile."""
    import hf_paged_kernels as kernels

    draws = 200 if DEVICE == "cpu" else 100000
    logits = floats(0.0, 1.0, 2.0, -1.0, 0.5, -3.0).expand(draws, 6).contiguous()
    positions = torch.arange(draws, device=DEVICE)
    one = torch.ones(draws, device=DEVICE)
    got = kernels.sample(logits, temperature=one, seeds=torch.full_like(positions, 42), positions=positions)
    expected = torch.softmax(logits[0].double(), 0) * draws
    chi = ((torch.bincount(got, minlength=6) - expected) ** 2 / expected).sum().item()
    assert chi < 36.0  # 5 degrees of freedom


def test_draw_does_not_depend_on_the_batch():
    import hf_paged_kernels as kernels

    logits, seeds, positions = batch(5, 400, 9)
    temperature, top_p = floats(*[1.3] * 5), floats(*[0.9] * 5)
    whole = kernels.sample(logits, temperature=temperature, seeds=seeds, positions=positions, top_p=top_p)
    for r in range(5):
        s = slice(r, r + 1)
        alone = kernels.sample(
            logits[s], temperature=temperature[s], seeds=seeds[s], positions=positions[s], top_p=top_p[s]
        )
        assert alone == whole[r]
    moved = kernels.sample(logits, temperature=temperature * 9, seeds=seeds, positions=positions + 1)
    assert not torch.equal(moved, whole)
