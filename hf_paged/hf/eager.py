"""Compiled models: in the engine's steps their parts run as they were before they were compiled."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_paged.hf.swaps import Swaps, at_rest


def eager(modules: list[nn.Module]) -> Swaps:
    """Swaps that bypass torch.compile during engine steps: compiled code would graph-break at each attention layer.

    Args:
        modules: those of a model.
    """
    swaps = Swaps()
    for module in modules:
        if at_rest(module, "_compiled_call_impl") is not None:  # module.compile()
            swaps.add(module, "_compiled_call_impl", None)
        original = _uncompiled(module, at_rest(module, "forward"))
        if original is not None:
            swaps.add(module, "forward", original)
    return swaps


def _uncompiled(module: nn.Module, forward: Any) -> Any:
    """What `torch.compile` was given, where a module's own forward came out of it; else None."""
    inner = module._modules.get("_orig_mod")  # module = torch.compile(module)
    if inner is not None and forward is not None:
        return inner.__call__
    return getattr(forward, "_torchdynamo_orig_callable", None)  # module.forward = torch.compile(module.forward)
