"""Whether a module computes what its class says: nothing hooked, wrapped, compiled or replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from hf_paged.hf.swaps import at_rest


def is_untouched(module: nn.Module) -> bool:
    """Whether a module's forward is its class's: not hooked, wrapped, compiled, parametrised or replaced."""
    forward_hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    hooked = module._backward_hooks or module._backward_pre_hooks or not all(map(changes_nothing, forward_hooks))
    forward = at_rest(module, "forward")
    own = forward is None or getattr(forward, "__func__", None) is type(module).forward  # bound: of a copied module
    compiled = at_rest(module, "_compiled_call_impl") is not None
    return not hooked and own and not compiled and "parametrizations" not in module._modules


def changes_nothing(hook: Any) -> bool:
    """Whether a forward hook is known to leave what is computed alone.

    That is so of the hooks by which Transformers collects hidden states, and of the one that marks embeddings for
    gradient checkpointing: Transformers, PEFT and recipes define it in the same words, and some leave one more behind
    each time.
    """
    if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
        return True
    code, known = getattr(hook, "__code__", None), _make_inputs_require_grads.__code__
    return code is not None and (code.co_code, code.co_names) == (known.co_code, known.co_names)


def _make_inputs_require_grads(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def is_watched(model: nn.Module) -> bool:
    """Whether somebody may look at what the model's modules hand on: a hook, or a forward that was replaced."""
    everywhere = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    return bool(everywhere) or not all(map(is_untouched, model.modules()))
