"""RMSNorm and gated activations against float64."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(got, expected, bound):
    assert not got.isnan().any()
    worst = ((got.double() - expected).abs() / bound).max().item()
    assert worst <= 1.01, f"{worst:.2f} times its error budget"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "rows"), [(64, 5), (80, 3), (1000, 2), (4096, 1), (128, 70)])
@pytest.mark.parametrize(("gemma", "weight"), [(False, True), (True, True), (False, False)])
def test_rms_norm(kit, n, rows, gemma, weight, dtype):
    import hf_paged_kernels as kernels

    generator = torch.Generator(DEVICE).manual_seed(n + rows)
    x, w = torch.randn(rows, n, device=DEVICE, generator=generator).to(dtype), None
    if weight:
        w = torch.randn(n, device=DEVICE, generator=generator).to(dtype)
    out = kit.poisoned(rows, n, dtype=dtype, device=DEVICE)
    kernels.rms_norm(x, w, eps=1e-5, out=out, gemma=gemma)
    y = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
    factor = torch.ones(n, device=DEVICE).double() if w is None else w.double() + (1 if gemma else 0)
    rounds = 1 if gemma or w is None else 2  # Llama's convention rounds before the weight as well
    u = kit.roundoff[dtype]
    bound = (rounds * u * (1 + u) + 2.0**-24 * (n**0.5 + 8)) * (y * factor).abs() + 4 * kit.tiny[dtype]
    bound += kit.tiny[dtype] * factor.abs() + 1e-300
    check(out, y * factor, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual(kit, dtype):
    """The sum is rounded to the residual's dtype, stored, and normed as stored: bit for bit an add, then a norm."""
    import hf_paged_kernels as kernels

    x, residual = (torch.randn(6, 96, device=DEVICE).to(dtype) for _ in "xr")
    w = torch.randn(96, device=DEVICE).to(dtype)
    before = residual.clone()
    total = (x.double() + before.double()).to(dtype)
    got = kernels.rms_norm(x, w, eps=1e-6, residual=residual)
    if DEVICE == "cuda" or dtype == torch.float32:  # the interpreter cuts bfloat16 off
        assert torch.equal(residual, total)
    assert torch.equal(got, kernels.rms_norm(residual, w, eps=1e-6))
    other = before.clone()
    reference = kernels.rms_norm(x, w, eps=1e-6, residual=other, impl="torch")
    close = {"rtol": 3 * kit.roundoff[dtype], "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.04, "atol": 0.01}
    torch.testing.assert_close(got, reference, **close)


def test_heads_of_a_merged_projection(kit):
    """3-D rows with strides of their own, in place: the norm of q and k heads."""
    import hf_paged_kernels as kernels

    merged = torch.randn(5, 6 * 32, device=DEVICE)
    heads = merged[:, 32 : 5 * 32].view(5, 4, 32)
    w = torch.randn(32, device=DEVICE)
    expected = kernels.rms_norm(heads.contiguous(), w, eps=1e-6)
    rest = merged[:, :32].clone()
    kernels.rms_norm(heads, w, eps=1e-6, out=heads)
    assert torch.equal(heads, expected)
    assert torch.equal(merged[:, :32], rest)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [17, 300])
def test_gated_activation(kit, kind, dtype, n):
    import hf_paged_kernels as kernels

    merged = (torch.randn(7, 2 * n, device=DEVICE) * 3).to(dtype)
    gate, up = merged[:, :n], merged[:, n:]
    out = kit.poisoned(7, n, dtype=dtype, device=DEVICE)
    kernels.gated_activation(gate, up, kind=kind, out=out)
    g = gate.double()
    functional = torch.nn.functional
    a = functional.silu(g) if kind == "silu" else functional.gelu(g, approximate="tanh" if "tanh" in kind else "none")
    u = kit.roundoff[dtype]
    # 1 - 1 / (1 + exp) and 1 + erf cancel for very negative gates: their error is one of size, 2^-22 of the gate.
    bound = (2 * u + u * u + 2.0**-21) * (a * up.double()).abs() + 2.0**-21 * (g * up.double()).abs()
    check(out, a * up.double(), bound + (1 + up.double().abs()) * kit.tiny[dtype] + 1e-300)
    close = kernels.gated_activation(gate, up, kind=kind, impl="torch").double()
    assert ((close - a * up.double()).abs() <= bound + (1 + up.double().abs()) * kit.tiny[dtype] + 1e-300).all()
