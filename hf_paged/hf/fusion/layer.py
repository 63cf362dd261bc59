"""A decoder layer of few launches: norms, products, rotation and cache write, activation, each with its neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from hf_paged.hf.attention import PagedStep
from hf_paged.hf.fusion.merge import MergedLinear
from hf_paged.hf.fusion.parts import GatedMLP, RotaryAttention, Wiring
from hf_paged.protocols import Kernels, Norm


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How a family lays its rotary embedding out.

    Attributes:
        interleaved: whether neighbours turn together, or else elements half the rotated part away.
        half: the columns of a model's cos and sin in which each angle stands once.
    """

    interleaved: bool
    half: Callable[[torch.Tensor], torch.Tensor]


def _all(x: torch.Tensor) -> torch.Tensor:
    return x


def _first(x: torch.Tensor) -> torch.Tensor:
    return x[..., : x.shape[-1] // 2]


def _every_second(x: torch.Tensor) -> torch.Tensor:
    return x[..., ::2]


# None: not at all. The commonest first.
ROTATIONS: tuple[Rotation | None, ...] = (
    Rotation(False, _first),
    Rotation(True, _every_second),
    Rotation(True, _first),
    Rotation(False, _all),
    None,
)


@dataclasses.dataclass(frozen=True)
class FusedLayer:
    """One way to compute a decoder layer; whether it is the right one, a trial step tells.

    Attributes:
        norms: the norms of `wiring`, by name.
        mlp: the gated MLP, or the module itself, called as it is.
        rotation: how queries and keys are rotated, or None.
        multiplier: what the two parts are multiplied by before they are added to the residual stream.
    """

    kernels: Kernels
    attention: RotaryAttention
    mlp: GatedMLP | nn.Module
    wiring: Wiring
    norms: Mapping[str, Norm]
    rotation: Rotation | None
    multiplier: float = 1.0

    def __call__(
        self,
        step: PagedStep,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's output, in place of its input.

        Args:
            hidden: [1, T, hidden size], the residual stream; written to.
            cos, sin: [1, T, rotated] as the model makes them.
            rows: int64 [S], the tokens whose output is asked for; None: all. Of the others only keys and values are
                made, and their part of the output is not the layer's.
        """
        total = hidden.view(-1, hidden.shape[-1])
        attended = self._attend(step, total, cos[0], sin[0])
        if rows is None:
            self._finish(total, attended)
        elif len(rows):
            own = total[rows]
            self._finish(own, attended[rows])
            total.index_copy_(0, rows, own)
        return hidden

    def products(self, tokens: int) -> Iterator[tuple[torch.Tensor, Callable[[], object]]]:
        """The weight of each product of the layer, with a call that makes it over zeros."""
        attention = self.attention

        def zeros(columns: int) -> torch.Tensor:
            return attention.qkv.weight.new_zeros(tokens, columns)

        total, wiring = zeros(attention.qkv.weight.shape[1]), self.wiring
        qkv, before_attention = attention.qkv, self._norm(wiring.before_attention)
        yield qkv.weight, lambda: self.kernels.linear(total, qkv.weight, qkv.bias, before_attention)
        out, after_attention = attention.out, self._norm(wiring.after_attention)
        yield out.weight, lambda: self._add(zeros(total.shape[1]), zeros(out.in_features), out, after_attention)
        if isinstance(self.mlp, GatedMLP):
            mlp, before_mlp = self.mlp, self._norm(wiring.before_mlp)
            yield mlp.gate_up.weight, lambda: self.kernels.gated(total, mlp.gate_up.weight, mlp.kind, before_mlp)
            down, after_mlp = self.mlp.down, self._norm(wiring.after_mlp)
            yield down.weight, lambda: self._add(zeros(total.shape[1]), zeros(down.in_features), down, after_mlp)

    @property
    def merged(self) -> Sequence[MergedLinear]:
        """Its merged weights."""
        return [self.attention.qkv, *([self.mlp.gate_up] if isinstance(self.mlp, GatedMLP) else [])]

    def _attend(self, step: PagedStep, total: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        own = self.attention
        qkv = self.kernels.linear(total, own.qkv.weight, own.qkv.bias, self._norm(self.wiring.before_attention))
        query, key, value = qkv.split(own.sizes, dim=-1)
        query = self._normed(query, own.query_norm, own.heads)
        key = self._normed(key, own.key_norm, own.kv_heads)
        value = value.unflatten(-1, (own.kv_heads, own.head_dim))
        turn = self.rotation
        rotary = (
            None if turn is None else {"cos": turn.half(cos), "sin": turn.half(sin), "interleaved": turn.interleaved}
        )
        return step.rotate_and_attend(own.index, query, key, value, rotary, own.options).flatten(1)

    def _finish(self, total: torch.Tensor, attended: torch.Tensor) -> None:
        self._add(total, attended, self.attention.out, self._norm(self.wiring.after_attention))
        self._feed_forward(total)

    def _feed_forward(self, total: torch.Tensor) -> None:
        before, after = self._norm(self.wiring.before_mlp), self._norm(self.wiring.after_mlp)
        if isinstance(self.mlp, GatedMLP):
            inner = self.kernels.gated(total, self.mlp.gate_up.weight, self.mlp.kind, before)
            self._add(total, inner, self.mlp.down, after)
            return
        out = self.mlp((total if before is None else self.kernels.norm(total, before))[None])
        out = (out[0] if isinstance(out, tuple) else out).view(total.shape)  # experts give their choices along
        total.add_(out if after is None else self.kernels.norm(out, after), alpha=self.multiplier)

    def _add(self, total: torch.Tensor, x: torch.Tensor, linear: nn.Linear, after: Norm | None) -> None:
        """Add a product to the residual stream."""
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        if after is None and self.multiplier == 1.0:
            self.kernels.add_linear(total, x, weight, bias)
            return
        out = self.kernels.linear(x, weight, bias)
        total.add_(out if after is None else self.kernels.norm(out, after), alpha=self.multiplier)

    def _norm(self, name: str | None) -> Norm | None:
        return None if name is None else self.norms[name]

    def _normed(self, x: torch.Tensor, norm: Norm | None, heads: int) -> torch.Tensor:
        """Queries or keys [T, heads, head_dim], normed by head, or as a whole where the norm's weight is as long."""
        by_head = x.unflatten(-1, (heads, self.attention.head_dim))
        if norm is None:
            return by_head
        if len(norm[0]) == self.attention.head_dim:
            return self.kernels.norm(by_head, norm)
        return self.kernels.norm(x[:, None], norm).view(by_head.shape)
