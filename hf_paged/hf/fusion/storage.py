"""Who else uses the memory of a parameter."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef, shared_cache


def owns_its_storage(parameter: torch.Tensor) -> bool:
    """Whether a parameter has a storage to itself, so that it may be given another one unnoticed.

    It hasn't where it is a part of a flat buffer, where another tensor (a kept `.data`, a NumPy array) uses the same
    memory, or where the memory is shared with other processes or pinned.
    """
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.nbytes or is_seen_elsewhere(parameter, 1):
        return False
    return storage.device.type != "cpu" or not parameter.is_pinned()


def is_seen_elsewhere(tensor: torch.Tensor, tensors: int) -> bool:
    """Whether more than `tensors` tensors, or another process, use this storage."""
    storage = tensor.untyped_storage()
    if storage.device.type == "cpu" and storage.is_shared():
        return True
    uses = torch._C._storage_Use_Count(storage._cdata) - 1  # without the object that asks
    return uses > tensors or StorageWeakRef(storage) in shared_cache.values()


def holders(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
