"""Merged weights: several linear layers' weights in one storage, whose parts the layers' own parameters become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class MergedLinear:
    """Linear layers over the same input as one, on their own live parameters.

    The merged weight is the storage, and the layers' parameters are views of it: optimisers, `state_dict` and whoever
    else holds a parameter go on as before, and what they write is what the merged product reads.

    Args:
        layers: plain linear layers (see `is_plain`), all or none of them with a bias; one is taken as it is.

    Attributes:
        weight: [sum of the layers' outputs, inputs].
        bias: [sum of the layers' outputs], or None.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = tuple(layers)
        self.bind()

    def bind(self) -> None:
        """Make the parameters parts of one storage, where they aren't."""
        with _ordinary_tensors():
            self.weight = _merged(self._weights)
            self.bias = _merged(self._biases) if self._biases else None

    @property
    def intact(self) -> bool:
        """Whether the layers' parameters still are what the merged product reads."""
        return _in_place(self.weight, self._weights) and (self.bias is None or _in_place(self.bias, self._biases))

    @property
    def _weights(self) -> list[torch.Tensor]:
        return [layer.weight for layer in self._layers]

    @property
    def _biases(self) -> list[torch.Tensor]:
        # A layer without a bias has None there, whatever torch's annotation says.
        return [layer._parameters["bias"] for layer in self._layers if layer._parameters["bias"] is not None]

    def restore(self) -> None:
        """Give each parameter a storage of its own again."""
        if len(self._layers) == 1:
            return
        with _ordinary_tensors():
            for layer in self._layers:
                for parameter, merged in ((layer.weight, self.weight), (layer.bias, self.bias)):
                    if parameter is not None and _shares(parameter, merged):
                        parameter.data = parameter.data.clone()


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Whatever mode the caller is in, its model must stay fit for training."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _merged(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parameters) == 1:
        return parameters[0].detach()
    merged = torch.cat([parameter.detach() for parameter in parameters])
    first = 0
    for parameter in parameters:
        parameter.data = merged[first : first + len(parameter)]
        first += len(parameter)
    return merged


def _in_place(merged: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
    address = merged.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != address or parameter.dtype != merged.dtype:
            return False
        address += parameter.nbytes
    return address == merged.data_ptr() + merged.nbytes


def _shares(parameter: torch.Tensor, merged: torch.Tensor | None) -> bool:
    return merged is not None and parameter.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr()


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody has hooked, wrapped, parametrised or replaced a module's forward."""
    hooked = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooked) and "forward" not in vars(module) and "parametrizations" not in module._modules


def is_watched(model: nn.Module) -> bool:
    """Whether somebody may look at what the model's modules hand on: a hook, or a forward that was replaced."""
    everywhere = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    return bool(everywhere) or not all(map(is_untouched, model.modules()))


def is_plain(module: Any, shared: Counter[int]) -> bool:
    """Whether a module is torch's linear layer itself: not quantised, adapted, sharded, hooked or tied.

    Args:
        shared: how many modules hold each parameter, by its id.
    """
    if type(module) is not nn.Linear or not is_untouched(module):
        return False
    return all(
        type(parameter) is nn.Parameter
        and type(parameter.data) is torch.Tensor
        and parameter.dtype in DTYPES
        and parameter.is_contiguous()
        and not parameter.is_inference()
        and shared[id(parameter)] == 1
        for parameter in module._parameters.values()
        if parameter is not None
    )


def holders(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
