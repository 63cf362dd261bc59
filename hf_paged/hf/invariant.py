"""Deterministic mode: from a model's input to its logits, nothing gives a token other bits for what is beside it.

A library's product does: it adds up in an order that depends on how many rows there are. So while the model runs, every
operation of torch passes by here. Products are made by the backend's own kernels; operations that work on each element,
or each row, for itself are let through; any other ends the attempt, by its name. What the backend's kernels and its
attention do is theirs to vouch for. In the end a few rows are computed alone, together and in pieces, and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_paged.errors import UnsupportedModelError
from hf_paged.protocols import Kernels

aten = torch.ops.aten

# What moves elements, makes tensors or picks some out.
_MOVES = {
    "_assert_async", "_local_scalar_dense", "_pin_memory", "_reshape_alias", "_to_copy", "_unsafe_view", "arange",
    "cat", "clone", "constant_pad_nd", "copy", "copy_", "detach", "embedding", "empty", "empty_like",
    "empty_strided", "fill", "fill_", "flip", "full", "full_like", "gather", "index", "index_copy", "index_copy_",
    "index_select", "lift_fresh", "masked_select", "new_empty", "new_empty_strided", "new_full", "new_ones",
    "new_zeros", "nonzero", "ones", "ones_like", "repeat", "repeat_interleave", "roll", "scalar_tensor",
    "select_scatter", "slice_scatter", "stack", "tril", "triu", "zero_", "zeros", "zeros_like",
}  # fmt: skip
# What is exact, or computes each row by itself in an order that its length alone decides.
_ROWWISE = {
    "_log_softmax", "_softmax", "all", "amax", "amin", "any", "argmax", "argmin", "floor_divide", "max", "min",
    "native_layer_norm", "sort", "topk",
}  # fmt: skip
# Sums, where their order is known to be the row's own: on a CPU.
_SUMS = {"_fused_rms_norm", "mean", "sum"}


class InvariantOps(TorchDispatchMode):
    """Watches a forward; see the module.

    Args:
        kernels: makes the products.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels
        self._trusting = 0

    def trusting(self, target: Any) -> Any:
        """The object, whose methods are not watched."""
        return _Trusted(target, self._without_watching)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation of torch; see the class."""
        kwargs = kwargs or {}
        if self._trusting or _lets_through(func) or _is_exact(func, args):
            return func(*args, **kwargs)
        if func is aten.mm.default:
            return self._product(args[0], args[1])
        if func is aten.addmm.default and not kwargs and args[0].dim() == 1:
            return self._product(args[1], args[2], args[0])
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        raise UnsupportedModelError(
            f"deterministic=True doesn't know that {func} gives a row the same bits whatever rows are beside it"
        )

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight.t()))
        return self._kernels.linear(x, weight, bias)

    def _without_watching(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._trusting += 1
        try:
            return call(*args, **kwargs)
        finally:
            self._trusting -= 1


class _Trusted:
    """An object in whose methods operations are not watched; see `InvariantOps.trusting`."""

    def __init__(self, target: Any, without_watching: Callable[..., Any]) -> None:
        self._target = target
        self._without_watching = without_watching

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found
        return lambda *args, **kwargs: self._without_watching(found, *args, **kwargs)


@cache
def _lets_through(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    return torch.Tag.pointwise in func.tags or func.is_view or name in _MOVES or name in _ROWWISE


def _is_exact(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is, with these arguments: sums of integers, or of rows on a CPU; products without a sum."""
    name = func._schema.name.removeprefix("aten::")
    first = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if first is None:
        return False
    if name in ("bmm", "mm"):
        return first.shape[-1] == 1
    on_cpu = name in _SUMS and first.device.type == "cpu"
    return on_cpu or (name in ("cumsum", "sum") and not first.is_floating_point())
