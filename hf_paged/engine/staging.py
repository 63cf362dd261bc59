"""Host arrays to the device, many in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

ALIGN = 16  # bytes; Triton compiles another kernel for addresses that this doesn't divide
BUFFERS = 3  # more than the engine has steps under way


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Have it current: Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event after what the current stream was given; None where an owner thread launches on this stream too.

    Source: CUDA's default stream is one for all threads; others aren't ordered with it.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class Staging:
    """Sends small arrays to a device through pinned memory; on a CPU they stay where they are.

    Pinned buffers take turns, and each waits for its last copy before it is written again, so that a copy is never
    overwritten while it is under way.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turn = 0
        self._buffers: list[torch.Tensor | None] = [None] * BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * BUFFERS

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Tensors on the device with the arrays' content, shapes and dtypes."""
        arrays = [np.ascontiguousarray(array) for array in arrays]
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        offsets, size = [], 0
        for array in arrays:
            offsets.append(size)
            size += -(-array.nbytes // ALIGN) * ALIGN
        packed = self._pinned(size)
        host = packed.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        moved = packed.to(self._device, non_blocking=True)
        self._sent()
        return [
            moved[offset : offset + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
            for array, offset in zip(arrays, offsets, strict=True)
        ]

    def _pinned(self, size: int) -> torch.Tensor:
        event, buffer = self._copied[self._turn], self._buffers[self._turn]
        if event is not None:
            event.synchronize()
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(2 * size, dtype=torch.uint8, pin_memory=True)
            self._buffers[self._turn] = buffer
        return buffer[:size]

    def _sent(self) -> None:
        event = self._copied[self._turn] or torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._copied[self._turn] = event
        self._turn = (self._turn + 1) % BUFFERS


_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}
