"""Merged weights: several linear layers' weights in one storage, whose parts the layers' own parameters become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_paged.hf.fusion.storage import is_seen_elsewhere, owns_its_storage
from hf_paged.hf.untouched import is_untouched

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SharedStorageError(Exception):
    """Parameters that can't be merged: something else uses the memory that they lie in."""


class MergedLinear:
    """Linear layers over the same input as one, on their own live parameters.

    The merged weight owns the storage; the layers' parameters are views of it, so optimizers and `state_dict` keep
    working, and what they write is what the merged product reads.

    Args:
        layers: plain linear layers (see `is_plain`), all or none of them with a bias; one is taken as it is.

    Attributes:
        weight: [sum of the layers' outputs, inputs].
        bias: [sum of the layers' outputs], or None.

    Raises:
        SharedStorageError: something else uses a parameter's memory; nothing was changed.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = tuple(layers)
        self.weight = torch.empty(0)
        self.bias: torch.Tensor | None = None
        self.bind()

    def bind(self) -> None:
        """Make the parameters parts of one storage, where they aren't.

        Raises:
            SharedStorageError: something else uses a parameter's memory; nothing was changed.
        """
        with _ordinary_tensors():
            if len(self._layers) > 1:
                _check_storage(self._weights, self.weight)
                _check_storage(self._biases, self.bias)
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
        """Give each parameter a storage of its own again.

        Where somebody took a view of the merged storage since (a `.data` that was kept, a process that it was sent
        to), the parameters stay there: they go on following what is written through that view.
        """
        if len(self._layers) == 1:
            return
        with _ordinary_tensors():
            self._restore(self._weights, self.weight)
            if self.bias is not None:
                self._restore(self._biases, self.bias)

    def _restore(self, parameters: Sequence[torch.Tensor], merged: torch.Tensor) -> None:
        inside = [parameter for parameter in parameters if _shares(parameter, merged)]
        if is_seen_elsewhere(merged, len(inside) + 1):  # the merged tensor's own use
            return
        for parameter in inside:
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


def _check_storage(parameters: Sequence[torch.Tensor], merged: torch.Tensor | None) -> None:
    """Raise SharedStorageError if something else uses a parameter's memory. Some may be parts of `merged` already."""
    inside = [p for p in parameters if merged is not None and _shares(p, merged)]
    if not all(owns_its_storage(p) for p in parameters if not any(p is one for one in inside)):
        raise SharedStorageError
    if inside and is_seen_elsewhere(inside[0], len(inside) + 1):  # the merged tensor's own use
        raise SharedStorageError


def _in_place(merged: torch.Tensor, parameters: Sequence[torch.Tensor]) -> bool:
    address = merged.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != address or parameter.dtype != merged.dtype:
            return False
        address += parameter.nbytes
    return address == merged.data_ptr() + merged.nbytes


def _shares(parameter: torch.Tensor, merged: torch.Tensor) -> bool:
    return parameter.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr()


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
        and parameter.layout is torch.strided
        and parameter.dtype in DTYPES
        and parameter.is_contiguous()
        and not parameter.is_inference()
        and shared[id(parameter)] == 1
        for parameter in module._parameters.values()
        if parameter is not None
    )
