"""What stands around attention in a decoder layer, in torch: fewer and larger products than the modules' own."""

from __future__ import annotations

import torch
from torch.nn import functional

from hf_paged.protocols import Norm

FEW_ROWS = 256  # to which the weight is the left operand of a product, as measured with MKL in float32
TILE = 16  # rows of each product in deterministic mode


class TorchKernels:
    """`hf_paged.protocols.Kernels` by torch's products."""

    def compiles(self, tokens: int, weight: torch.Tensor) -> bool:
        return False

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        weight, eps, gemma = norm
        y = functional.rms_norm(x.float(), x.shape[-1:], eps=eps)
        # Rounded where the models round: Gemma's weight meets the float32 value, the others' the rounded one.
        return (y * (1.0 + weight.float())).to(x.dtype) if gemma else weight * y.to(x.dtype)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm: Norm | None = None
    ) -> torch.Tensor:
        out = _product(x if norm is None else self.norm(x, norm), weight).contiguous()
        return out if bias is None else out.add_(bias)

    def gated(self, x: torch.Tensor, weight: torch.Tensor, kind: str, norm: Norm | None = None) -> torch.Tensor:
        return _gated(_product(x if norm is None else self.norm(x, norm), weight), kind)

    def add_linear(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        if _weight_goes_left(x):
            total.add_(_product(x, weight))
        else:
            total.addmm_(x, weight.t())
        if bias is not None:
            total.add_(bias)


class TiledKernels(TorchKernels):
    """The same for deterministic mode: products of one shape, in which a row has its bits whatever is beside it."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm: Norm | None = None
    ) -> torch.Tensor:
        out = _tiled(x if norm is None else self.norm(x, norm), weight)
        return out if bias is None else out.add_(bias)

    def gated(self, x: torch.Tensor, weight: torch.Tensor, kind: str, norm: Norm | None = None) -> torch.Tensor:
        rows = self.linear(x, weight, None, norm).split(1)  # one at a time: see `hf_paged.hf.vectors`
        return torch.cat([_gated(row, kind) for row in rows])

    def add_linear(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        total.add_(self.linear(x, weight, bias))


def _tiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `_product`, TILE rows at a time; the last ones are filled up with zeros."""
    rows = len(x)
    padded = x.new_zeros(-(-rows // TILE) * TILE, x.shape[1])
    padded[:rows] = x
    return torch.cat([_product(tile, weight) for tile in padded.split(TILE)])[:rows].contiguous()


def _gated(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    if kind == "silu":
        return functional.silu(gate).mul_(up)
    return functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none").mul_(up)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """X [rows, in] times the weight [out, in]: [rows, out], of few rows as the transpose of a contiguous tensor.

    With the weight as the left operand a CPU's BLAS reads it once, as it lies. As the right one it is packed first,
    which takes as long as the product of a dozen rows.
    """
    return torch.mm(weight, x.t()).t() if _weight_goes_left(x) else functional.linear(x, weight)


def _weight_goes_left(x: torch.Tensor) -> bool:
    return len(x) <= FEW_ROWS and x.dtype == torch.float32 and x.device.type == "cpu"


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, exact: bool = False
) -> torch.Tensor:
    """The first elements of each head turned (Su et al., 2021): [T, heads, head_dim], by angles [T, half of them].

    `exact`: each product and sum rounded for itself, so that vector and scalar code give the same.
    """
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(f"cos has {half} angles; heads of {x.shape[-1]} elements take {x.shape[-1] // 2} at most")
    cos, sin, turned = cos[:, None], sin[:, None], x[..., : 2 * half]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    if exact:
        pair = a * cos - b * sin, b * cos + a * sin
    else:
        pair = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return out if 2 * half == x.shape[-1] else torch.cat([out, x[..., 2 * half :]], -1)
