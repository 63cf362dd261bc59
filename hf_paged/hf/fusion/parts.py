"""The parts of a decoder layer, found by structure: norms, a gated MLP, an attention with rotary embedding.

What is found here is a guess about what a module computes; `layer.py` makes a forward of it, and `forward.py` has it
proved by a trial step before it serves.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_paged.hf.fusion.merge import MergedLinear, SharedStorageError, is_plain
from hf_paged.hf.untouched import is_untouched
from hf_paged.protocols import Kernels, Norm

EPS_NAMES = ("variance_epsilon", "eps")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
# Relative errors that rounding explains; what computes something else is off by far more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


# ---------------------------------------------------------------------------------------------------------------- norms


def find_norm(module: Any, kernels: Kernels) -> Norm | None:
    """A module's norm, if it is a root-mean-square norm as the kernels compute it: tried on random rows."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Module) or not is_untouched(module) or list(module._parameters) != ["weight"]:
        return None
    eps = next((getattr(module, name) for name in EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.dtype not in TOLERANCE or eps is None:
        return None
    generator = torch.Generator(weight.device).manual_seed(0)
    x = 3 * torch.randn(4, len(weight), dtype=weight.dtype, device=weight.device, generator=generator)
    with torch.no_grad():
        try:
            wanted = module(x)
        except Exception:  # it takes more than rows: another kind of norm
            return None
        for gemma in (False, True):
            norm = weight, eps, gemma  # the parameter itself: its storage may be replaced
            if wanted.shape == x.shape and error(kernels.norm(x, norm), wanted) <= TOLERANCE[x.dtype]:
                return norm
    return None


# ------------------------------------------------------------------------------------------------------------------ MLP


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """down(act(gate(x)) · up(x))."""

    gate_up: MergedLinear
    down: nn.Linear
    kind: str


def find_mlp(module: Any, shared: Counter[int]) -> GatedMLP | None:
    """A layer's MLP, if it is gated: gate_proj and up_proj, or gate_up_proj with the gate first; then down_proj.

    One whose weights can't be merged runs as it is.
    """
    if not isinstance(module, nn.Module) or not is_untouched(module):
        return None
    names = ["gate_up_proj"] if hasattr(module, "gate_up_proj") else ["gate_proj", "up_proj"]
    inputs: list[Any] = [getattr(module, name, None) for name in names]
    down: Any = getattr(module, "down_proj", None)
    if len(module._modules) != len(names) + 2 or not all(is_plain(part, shared) for part in (*inputs, down)):
        return None
    kind = _activation(next((getattr(module, n) for n in ("act_fn", "activation_fn") if hasattr(module, n)), None))
    if kind is None or any(part.bias is not None for part in inputs):
        return None
    try:
        return GatedMLP(MergedLinear(inputs), down, kind)
    except SharedStorageError:
        return None


def _activation(function: Any) -> str | None:
    if not callable(function):
        return None
    x = torch.linspace(-4, 4, 64)
    with torch.no_grad():
        y = function(x)
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(known(x), y, atol=1e-6)), None)


# ------------------------------------------------------------------------------------------------------------ attention


@dataclasses.dataclass(frozen=True)
class RotaryAttention:
    """Queries, keys and values of one product, normed by head or as a whole where there are norms, and rotated.

    Attributes:
        index: which of the model's attention layers it is.
        qkv, out: the products.
        heads, kv_heads, head_dim: query heads, key and value heads, and their size.
        query_norm, key_norm: norms between the product and the rotation, or None.
        options: scale, softcap and sinks of the attention, as `LayerPlan.run` takes them.
    """

    index: int
    qkv: MergedLinear
    out: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    query_norm: Norm | None
    key_norm: Norm | None
    options: dict[str, Any]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of queries, keys and values."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv


def find_attention(seen: Any, index: int, kernels: Kernels, shared: Counter[int]) -> RotaryAttention | None:
    """An attention module, if it is made of plain products: q_proj, k_proj and v_proj, or qkv_proj; then o_proj.

    Args:
        seen: what the look at the model saw of it (`spec.SeenLayer`).
        index: its place among the model's attention layers.

    Raises:
        SharedStorageError: its weights can't be merged.
    """
    module, spec = seen.module, seen.spec
    names = ["qkv_proj"] if hasattr(module, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    inputs: list[Any] = [getattr(module, name, None) for name in names]
    out: Any = getattr(module, "o_proj", None)
    plain = is_untouched(module) and all(is_plain(part, shared) for part in (*inputs, out))
    columns = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if not plain or spec.head_dim != spec.value_head_dim or sum(part.out_features for part in inputs) != columns:
        return None
    if len({part.bias is None for part in inputs}) != 1:
        return None
    norms = {name: part for name, part in module._modules.items() if name not in (*names, "o_proj")}
    found = {name: find_norm(part, kernels) for name, part in norms.items()}
    if not found.keys() <= {"q_norm", "k_norm"} or None in found.values():
        return None  # it has parts that are not known here
    options = {"scale": seen.scale, "softcap": seen.softcap, "sinks": seen.sinks}
    return RotaryAttention(
        index, MergedLinear(inputs), out, spec.num_heads, spec.num_kv_heads, spec.head_dim,
        found.get("q_norm"), found.get("k_norm"), options,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- wiring


@dataclasses.dataclass(frozen=True)
class Wiring:
    """Which norm stands where: before and after attention, before and after the MLP; None where none does."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None

    @property
    def names(self) -> set[str]:
        """The norms that it places."""
        return {name for name in dataclasses.astuple(self) if name is not None}


WIRINGS: Sequence[Wiring] = (
    Wiring("input_layernorm", None, "post_attention_layernorm", None),
    Wiring("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    Wiring(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    Wiring("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
