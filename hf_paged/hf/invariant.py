"""Deterministic mode: from a model's input to its logits, nothing gives a token other bits for what is beside it.

A library's product does: it adds up in an order that depends on how many rows there are. So while the model runs, every
operation of torch passes by here. Products are made by the backend's own kernels; operations that work on each element,
or each row, for itself are let through; any other ends the attempt, by its name. What the backend's kernels and its
attention do is theirs to vouch for. In the end a few rows are computed alone, together and in pieces, and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_paged.errors import UnsupportedModelError
from hf_paged.hf.vectors import in_whole_vectors
from hf_paged.protocols import Kernels

aten = torch.ops.aten

# What moves elements, makes tensors or picks some out.
_MOVES = {
    "_assert_async", "_local_scalar_dense", "_pin_memory", "_reshape_alias", "_to_copy", "_unsafe_view", "arange",
    "cat", "clone", "constant_pad_nd", "copy", "copy_", "detach", "embedding", "empty", "empty_like", "empty_strided",
    "fill", "fill_", "flip", "full", "full_like", "gather", "index", "index_copy", "index_copy_", "index_select",
    "lift_fresh", "masked_select", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "nonzero",
    "ones", "ones_like", "repeat", "repeat_interleave", "roll", "scalar_tensor", "select_scatter", "slice_scatter",
    "stack", "tril", "triu", "zero_", "zeros", "zeros_like",
}  # fmt: skip
# Of one element each, and exact or rounded once, as IEEE 754 has it: vector and scalar code give the same.
_EXACT = {
    "abs", "add", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "ceil", "clamp", "clamp_max", "clamp_min",
    "div", "eq", "floor", "floor_divide", "ge", "gt", "isinf", "isnan", "le", "logical_and", "logical_not",
    "logical_or", "logical_xor", "lt", "masked_fill", "maximum", "minimum", "mul", "ne", "neg", "reciprocal", "relu",
    "round", "sign", "sqrt", "sub", "trunc", "where",
}  # fmt: skip
# Along one dimension: exact, or added up in an order that its length alone decides.
_ALONG_A_ROW = {
    "_log_softmax", "_softmax", "all", "amax", "amin", "any", "argmax", "argmin", "max", "min", "native_layer_norm",
    "sort", "topk",
}  # fmt: skip
# Likewise on a CPU, where a row is shorter than what two threads share.
_SUMS = {"_fused_rms_norm", "mean", "sum"}
_LONGEST_SUM = 32_768

_trusting: ContextVar[bool] = ContextVar("hf_paged_trusting", default=False)


class InvariantOps(TorchDispatchMode):
    """Watches a forward; see the module.

    Args:
        kernels: makes the products.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation of torch; see the class."""
        kwargs = kwargs or {}
        if _trusting.get() or _is_invariant(func, args, kwargs):
            return func(*args, **kwargs)
        if func is aten.mm.default:
            return self._product(args[0], args[1])
        if func is aten.addmm.default and not kwargs and args[0].dim() == 1:
            return self._product(args[1], args[2], args[0])
        if torch.Tag.pointwise in func.tags:
            return in_whole_vectors(func, args, kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        raise UnsupportedModelError(
            f"deterministic=True doesn't know that {func} gives a row the same bits whatever rows are beside it"
        )

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight.t()))
        return self._kernels.linear(x, weight, bias)


def trusted(target: Any) -> Any:
    """The object, in whose methods no operation is watched, by whomever."""
    return _Trusted(target)


class _Trusted:
    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if callable(found):
            found = _without_watching(found)
            setattr(self, name, found)  # to be found at once from now on
        return found


def _without_watching(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        token = _trusting.set(True)
        try:
            return call(*args, **kwargs)
        finally:
            _trusting.reset(token)

    return called


def _is_invariant(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation, with these arguments, is one that gives each element or row its own bits."""
    name = _name(func)
    if func.is_view or name in _MOVES:
        return True
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    if not any(x.is_floating_point() or x.is_complex() for x in tensors):
        return torch.Tag.pointwise in func.tags or name in _ALONG_A_ROW or name in ("cumsum", "floor_divide", "sum")
    if torch.Tag.pointwise in func.tags or name in _EXACT:
        on_gpu = tensors[0].device.type != "cpu"  # where each element has a thread, and there is but one kind of code
        return on_gpu or (name.removesuffix("_") in _EXACT and "alpha" not in kwargs)
    if name in ("bmm", "mm"):
        return tensors[0].shape[-1] == 1  # nothing is added up
    if name in _ALONG_A_ROW:
        return _is_along_the_last(func, args, kwargs)
    short = name in _SUMS and tensors[0].device.type == "cpu" and tensors[0].shape[-1] < _LONGEST_SUM
    return short and _is_along_the_last(func, args, kwargs)


def _is_along_the_last(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it works along the last dimension, and not along that of the tokens."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if "normalized_shape" in given:
        return len(given["normalized_shape"]) == 1
    dims = given.get("dim")
    if dims is None:
        return "dim" in names and func._schema.arguments[names.index("dim")].default_value == -1
    size = args[0].dim()
    return [dim % size for dim in (dims if isinstance(dims, list | tuple) else [dims])] == [size - 1]


@cache
def _name(func: Any) -> str:
    return str(func._schema.name.removeprefix("aten::"))
