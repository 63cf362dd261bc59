"""Noticing that the weights changed, so that no key or value of the old ones is ever reused."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from hf_paged.hf.swaps import at_rest
from hf_paged.hf.untouched import changes_nothing

SAMPLES = 8  # elements looked at of each parameter
# Options of a config, by parts of their names, and attributes of modules that say how attention is computed.
CONFIG_PARTS = ("window", "layer_type", "softcap", "rope", "scal", "multiplier", "chunk", "causal")
MODULE_OPTIONS = {"sliding_window", "is_causal", "scaling", "attn_logit_softcapping", "layer_type", "attention_type"}
REPLACED = {"forward", "_compiled_call_impl"}  # what a module's owner may put in place of its class's forward
_INT_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightWatch:
    """Tells whether a model's weights may have changed between two looks.

    A parameter changes by an in-place operation (its version counter moves), by getting new storage (its pointer
    moves), or through `parameter.data`, which moves neither; so a few elements of each are compared as well. Adapters
    are switched by attributes of their layers, and hooks come and go.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def fingerprint(self, *, places: bool = True) -> Hashable:
        """A value that is another one after the weights, the active adapters, the hooks or the modules changed.

        Args:
            places: whether it is another one, too, where weights lie elsewhere and look the same.
        """
        modules = self._modules()
        tensors = _tensors(modules)
        counters = hash(tuple((id(t), _version(t), places and tuple(_places(t))) for t in tensors))
        parts = (part for t in tensors for part in _parts(t))
        return counters, _sampled(parts), tuple(_adapters(modules)), tuple(_hooks(modules))

    def graph_key(self) -> Hashable:
        """A value that is another one after a parameter or buffer was put elsewhere, or an adapter was switched."""
        modules = self._modules()
        return hash((tuple(place for t in _tensors(modules) for place in _places(t)), *_adapters(modules)))

    def _modules(self) -> list[nn.Module]:
        model = self._model()
        return [] if model is None else modules_of(model)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """A model and all its parts, each once: `nn.Module.modules` takes milliseconds, and this is asked at each call."""
    found: dict[nn.Module, None] = {}
    left = [model]
    while left:
        module = left.pop()
        if module not in found:
            found[module] = None
            left += [part for part in reversed(module._modules.values()) if part is not None]
    return list(found)


def _tensors(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers, each once, but for those without memory."""
    kinds = (kind for module in modules for kind in (module._parameters, module._buffers))
    tensors = {id(t): t for kind in kinds for t in kind.values() if t is not None and not t.is_meta}
    return list(tensors.values())


_PLAIN = (nn.Parameter, torch.Tensor)


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tensors with memory of their own that a quantised, sharded or sparse tensor is made of.

    An ordinary one is its only part. One that doesn't say what it is made of is given as it is.
    """
    if tensor.layout is not torch.strided:
        return _sparse_parts(tensor)
    if type(tensor) in _PLAIN:
        return (tensor,)
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        inner = [getattr(tensor, name, None) for name in names]
        return [part for one in inner if isinstance(one, torch.Tensor) for part in _parts(one)]
    return (tensor.data if type(tensor.data) is torch.Tensor else tensor,)


def _sparse_parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def _places(tensor: torch.Tensor) -> Iterator[int]:
    """Where the parts of a tensor lie; one that doesn't say counts by the object."""
    for part in _parts(tensor):
        try:
            yield part.data_ptr()
        except RuntimeError:
            yield id(tensor)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors have no counter


def _sampled(tensors: Iterable[torch.Tensor]) -> int:
    """A hash of a few elements of each tensor, bit for bit."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if type(tensor) in _PLAIN and tensor.numel() and tensor.is_contiguous():
            picked = _spread(tensor.detach())
            if not picked.is_complex():  # not every dtype can be put together
                picked = picked.view(_INT_VIEWS[picked.itemsize])
            by_kind.setdefault((picked.device, picked.dtype), []).append(picked)
    groups = [torch.cat(group).view(torch.uint8) for group in by_kind.values()]
    return hash(tuple(group.cpu().numpy().tobytes() for group in groups))


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """Up to SAMPLES elements of a contiguous tensor, from its whole length."""
    step = max(1, tensor.numel() // SAMPLES)
    return tensor.as_strided((min(SAMPLES, tensor.numel()),), (step,), tensor.storage_offset())


def structure(model: nn.Module) -> Hashable:
    """What a model was looked at with: another value after its modules, hooks or attention options changed."""
    modules = modules_of(model)
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    kinds = frozenset((p.dtype, p.device) for p in parameters), tuple(map(id, parameters))
    configs = {id(own["config"]): own["config"] for own in map(vars, modules) if "config" in own}.values()
    options = [
        (name, repr(value))
        for config in configs
        for name, value in list(getattr(config, "__dict__", {}).items())
        if any(part in name for part in CONFIG_PARTS)
    ]
    for module in modules:
        own = vars(module)
        options += [(name, repr(own[name])) for name in MODULE_OPTIONS & own.keys()]
        replaced = ((name, at_rest(module, name)) for name in REPLACED & own.keys())
        options += [(name, str(id(value))) for name, value in replaced if value is not None]
    return kinds, tuple(map(id, modules)), tuple(_hooks(modules)), hash(tuple(options))


def _hooks(modules: Iterable[nn.Module]) -> Iterator[int]:
    """The ids of the forward hooks that may change what a layer gives; no id is used twice."""
    yield from torch_modules._global_forward_hooks
    yield from torch_modules._global_forward_pre_hooks
    for module in modules:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            yield from (number for number, hook in hooks.items() if not changes_nothing(hook))


def _adapters(modules: Iterable[Any]) -> Iterator[Hashable]:
    """What PEFT layers do at the moment: which adapters are active, merged, scaled, or switched off."""
    for module in modules:
        if hasattr(module, "merged_adapters"):
            scaling = getattr(module, "scaling", None)
            scales = tuple(scaling.items()) if isinstance(scaling, dict) else ()
            yield tuple(module.active_adapters), bool(module.disable_adapters), tuple(module.merged_adapters), scales
