"""A step under way: launched on the device, its tokens not known to the host yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from hf_paged.types import Request, Scheduled, Step


@dataclasses.dataclass
class Flight:
    """What is needed to land a step.

    Attributes:
        step: what was launched.
        began: when, in seconds of `time.monotonic()`.
        queues: how many requests ran and waited once it was scheduled.
        sampling: its rows that sample, each with its row of the step's logits.
        chosen: the tokens that were chosen on the device, for the requests of `places`.
        places: for each of these its index in `chosen`.
        logits: [S, vocabulary], what the other rows sample from when the step lands; None without others.
        mark: behind all that was launched for it.
    """

    step: Step
    began: float
    queues: tuple[int, int] = (0, 0)
    sampling: Sequence[tuple[Scheduled, int]] = ()
    chosen: ChosenTokens | None = None
    places: Mapping[Request, int] = dataclasses.field(default_factory=dict)
    logits: torch.Tensor | None = None
    mark: Mark | None = None


class Mark:
    """A place in the work of the current stream; work on another stream can be had to come after it.

    Callers take turns at driving the engine, and each may have a stream of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def come_after(self) -> None:
        """Have what the current stream is given from now on wait for it, on the device."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)


class ChosenTokens:
    """Tokens on the device, on their way to the host.

    Args:
        tokens: int64 [n].
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self.on_device = tokens
        self._arrived: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._on_host.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tokens.device))
        else:
            self._on_host = tokens

    def wait(self) -> Sequence[int]:
        """The tokens, once the device has chosen them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host.tolist()
