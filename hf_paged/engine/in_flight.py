"""A step in flight: launched on the device, its tokens not known to the host yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from hf_paged.batch import Scheduled, Step
from hf_paged.request import Request


@dataclasses.dataclass
class InFlightStep:
    """What is needed to land a step.

    Attributes:
        step: what was launched.
        began: when, in seconds of `time.monotonic()`.
        queues: how many requests ran and waited once it was scheduled.
        sampling: its rows that sample, each with its row of the step's logits.
        sampled: the tokens that were sampled on the device, for the requests of `sampled_index`.
        sampled_index: for each of these its index in `sampled`.
        logits: [S, vocabulary], what the other rows sample from when the step lands; None without others.
    """

    step: Step
    began: float
    queues: tuple[int, int] = (0, 0)
    sampling: Sequence[tuple[Scheduled, int]] = ()
    sampled: SampledTokens | None = None
    sampled_index: Mapping[Request, int] = dataclasses.field(default_factory=dict)
    logits: torch.Tensor | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether a request of it goes on; the others have ended since it was launched."""
        return any(not row.request.finished for row in self.step.rows)


class SampledTokens:
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
        """The tokens, once the device has sampled them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._on_host.tolist()
