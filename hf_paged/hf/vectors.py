"""Elementwise operations on a CPU, so that an element's bits don't depend on where it lies.

torch computes most of a tensor with vector instructions and what is left of each thread's share with scalar ones, whose
exp or tanh may end in another bit. Where the shares end depends on how many elements and threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

WHOLE = 128  # elements: whole vectors of any width, two at a time, as torch's loops take them
PIECE = 16_384  # elements that one thread does alone


def in_whole_vectors(
    function: Callable[..., torch.Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """`function(*args)` of an elementwise function, in pieces of whole vectors.

    Args:
        function: an operator of torch, such as `torch.ops.aten.silu.default`; one that works in place, too.
        args, kwargs: its arguments; tensors are broadcast against each other.
    """
    shape = torch.broadcast_shapes(*(x.shape for x in args if _is_split(x)))
    count = shape.numel()
    flat = [_filled_up(x.expand(shape).reshape(-1)) if _is_split(x) else x for x in args]
    pieces = [
        function(*(x[first : first + PIECE] if _is_split(x) else x for x in flat), **(kwargs or {}))
        for first in range(0, max(1, count), PIECE)
    ]
    out = torch.cat(pieces)[:count].view(shape)
    in_place = getattr(getattr(function, "_schema", None), "is_mutable", False)
    return args[0].copy_(out) if in_place else out


def _is_split(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() > 0


def _filled_up(x: torch.Tensor) -> torch.Tensor:
    """A copy whose length is a multiple of WHOLE, with ones at the end."""
    out = x.new_ones(-(-max(1, len(x)) // WHOLE) * WHOLE)
    out[: len(x)] = x
    return out
