"""StructuredProcessor: drops from each constrained row the tokens that may not follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hf_paged.request import Request
from hf_paged_structured.constraint import Ahead, GrammarConstraint


class StructuredProcessor:
    """The logits processor of an engine; it changes logits in place.

    Attributes:
        needs_tokens: all earlier tokens of the requests that it concerns have to be known when it is called.
    """

    needs_tokens = True

    def __init__(self) -> None:
        self._ahead: Ahead | None = None  # no thread before there is something to do

    def concerns(self, request: Request) -> bool:
        """Whether this plugin constrained the request."""
        return isinstance(request.constraint, GrammarConstraint)

    def process(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        rows, constraints = [], []
        for row, request in enumerate(requests):
            if isinstance(request.constraint, GrammarConstraint):
                rows.append(row)
                constraints.append(request.constraint)
                self._make_ready(request, request.constraint)
        if rows:
            self._compute(constraints)
            apply(logits, rows, [c.mask for c in constraints if c.mask is not None])
        return logits

    def _make_ready(self, request: Request, constraint: GrammarConstraint) -> None:
        if self._ahead is None:
            self._ahead = Ahead()
        constraint.ahead = self._ahead
        constraint.catch_up(request)  # a resumed request begins with output tokens

    def _compute(self, constraints: Sequence[GrammarConstraint]) -> None:
        """Every constraint has its mask then: those not computed ahead are computed now."""
        assert self._ahead is not None
        self._ahead.wait_for(constraints)
        self._ahead.compute([c for c in constraints if c.mask is None and c.error is None])
        for constraint in constraints:
            if constraint.mask is None:  # any token may follow: its error ends the request then
                constraint.mask = np.full(constraint.words, -1, dtype=np.int32)


def apply(logits: torch.Tensor, rows: Sequence[int], masks: Sequence[np.ndarray]) -> None:
    """Set to -inf, in place, what the masks leave out.

    Args:
        logits: float32 [requests, vocabulary of the model].
        rows: those that the masks are for.
        masks: int32 [words] for each row, a bit for each id of the tokenizer, lowest first. Others are dropped.
    """
    words = max(map(len, masks))
    packed = np.zeros((len(masks), words), dtype=np.int32)
    for row, mask in zip(packed, masks, strict=True):
        row[: len(mask)] = mask
    octets = _upload(torch.from_numpy(packed.view(np.uint8)), logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((octets[:, :, None] >> shifts) & 1).flatten(1).bool()
    width = min(allowed.shape[1], logits.shape[1])
    keep = logits.new_zeros((len(rows), logits.shape[1]), dtype=torch.bool)
    keep[:, :width] = allowed[:, :width]
    if len(rows) == len(logits):
        logits.masked_fill_(~keep, -torch.inf)
    else:
        at = _upload(torch.tensor(rows), logits.device)
        logits[at] = logits[at].masked_fill(~keep, -torch.inf)


def _upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that doesn't wait for it."""
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
