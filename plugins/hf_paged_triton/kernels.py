"""Norms and linear layers around attention: the kernels, or cuBLAS where it is faster; and sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

import hf_paged_kernels as kernels
from hf_paged.protocols import Norm


class TritonKernels:
    """`hf_paged.protocols.Kernels`: a Triton kernel where it was measured faster, else torch's own product."""

    def compiles(self, tokens: int, weight: torch.Tensor) -> bool:
        n, k = weight.shape
        return kernels.linear_serves(tokens, n, k, weight.dtype, weight.device)

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        weight, eps, gemma = norm
        return kernels.rms_norm(x, weight, eps=eps, gemma=gemma)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm: Norm | None = None
    ) -> torch.Tensor:
        if _serves(x, weight, norm):
            return kernels.linear(x, weight, bias=bias, **_normed(norm))
        return functional.linear(x if norm is None else self.norm(x, norm), weight, bias)

    def gated(self, x: torch.Tensor, weight: torch.Tensor, kind: str, norm: Norm | None = None) -> torch.Tensor:
        if _serves(x, weight, norm, gate=True):
            return kernels.linear(x, weight, gate=kind, **_normed(norm))
        gate, up = functional.linear(x if norm is None else self.norm(x, norm), weight).chunk(2, -1)
        return kernels.gated_activation(gate, up, kind=kind)

    def add_linear(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        if _serves(x, weight):
            kernels.linear(x, weight, bias=bias, residual=total, out=total)
            return
        total.addmm_(x, weight.t())
        if bias is not None:
            total.add_(bias)


class InvariantKernels:
    """The same for deterministic mode: a token's result has the same bits whatever other tokens are in the batch.

    cuBLAS can't be used there, since its order of additions depends on the number of tokens.
    """

    def compiles(self, tokens: int, weight: torch.Tensor) -> bool:
        return True

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        weight, eps, gemma = norm
        return kernels.rms_norm(x, weight, eps=eps, gemma=gemma, invariant=True)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm: Norm | None = None
    ) -> torch.Tensor:
        return kernels.linear(x, weight, bias=bias, invariant=True, **_normed(norm))

    def gated(self, x: torch.Tensor, weight: torch.Tensor, kind: str, norm: Norm | None = None) -> torch.Tensor:
        return kernels.linear(x, weight, gate=kind, invariant=True, **_normed(norm))

    def add_linear(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        kernels.linear(x, weight, bias=bias, residual=total, out=total, invariant=True)


class TritonSampling:
    """`hf_paged.protocols.SamplingKernels` by Triton kernels."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return kernels.argmax(logits)

    def sample(
        self,
        logits: torch.Tensor,
        *,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor | None,
        min_p: torch.Tensor | None,
    ) -> torch.Tensor:
        return kernels.sample(
            logits, temperature=temperature, seeds=seeds, positions=positions, top_k=top_k, top_p=top_p, min_p=min_p
        )


def _serves(x: torch.Tensor, weight: torch.Tensor, norm: Norm | None = None, gate: bool = False) -> bool:
    n, k = weight.shape
    return kernels.linear_serves(len(x), n, k, x.dtype, x.device, norm=norm is not None, gate=gate)


def _normed(norm: Norm | None) -> dict[str, Any]:
    """A norm as keyword arguments of `linear`."""
    return {} if norm is None else {"norm_weight": norm[0], "eps": norm[1], "gemma": norm[2]}
