"""Samples each row's token: on the device as the step is launched, or on the host when it lands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hf_paged.batch import Batch
from hf_paged.engine.batch_sampler import BatchSampler, needs_history
from hf_paged.engine.graphs import decode_sizes
from hf_paged.engine.in_flight import InFlightStep, SampledTokens
from hf_paged.protocols import LogitsProcessor, PagedModel, TokenSampler
from hf_paged.request import Request, Sampled

Choice = tuple[list[Request], torch.Tensor, "Sampled | Exception"]


class Sampler:
    """Samples tokens for the requests of an engine.

    Args:
        sampler: serves requests without a sampler of their own.
        processors: run on the logits before any sampler, in order.
        ahead: whether tokens are sampled at launch, where they can be.
    """

    def __init__(self, sampler: BatchSampler, processors: Sequence[LogitsProcessor], *, ahead: bool) -> None:
        self._sampler = sampler
        self._processors = tuple(processors)
        self._ahead = ahead

    def runs_ahead(self, request: Request) -> bool:
        """Whether its tokens can be sampled at launch: nothing about them, or those before, is asked of the host."""
        params = request.params
        plain = params.logprobs is None and params.prompt_logprobs is None and not needs_history(request)
        processed = any(_concerns(p, request) and getattr(p, "needs_tokens", True) for p in self._processors)
        return self._ahead and request.sampler is None and plain and not processed

    def launch(self, in_flight: InFlightStep, batch: Batch, logits: torch.Tensor) -> None:
        """Sample what can be sampled now, and keep the logits that are needed when the step lands.

        Args:
            batch: the step's.
            logits: [S, vocabulary]; the next forward may overwrite them.
        """
        in_flight.sampling = batch.sampling
        ours = [(row.request, index) for row, index in in_flight.sampling if row.request.runs_ahead]
        if ours:
            requests = [request for request, _ in ours]
            own = self._processed(requests, _picked(logits, [index for _, index in ours]))
            in_flight.sampled = SampledTokens(self._sampler.launch(requests, own))
            in_flight.sampled_index = {request: index for index, request in enumerate(requests)}
        if len(ours) < (len(logits) if batch.layout is None else len(in_flight.sampling)):
            in_flight.logits = logits.clone() if self._ahead else logits

    def warm_up(self, model: PagedModel, rows: int) -> None:
        """Sample once from each number of rows that graphs are captured for."""
        if self._ahead:
            sizes = decode_sizes(rows)
            logits = torch.zeros(sizes[-1], model.num_logits, dtype=model.spec.dtype, device=model.spec.device)
            self._sampler.rehearse(logits, sizes)

    def land(self, in_flight: InFlightStep) -> Iterator[Choice]:
        """What the other rows' samplers sample, each for its own requests in one go: (requests, logits, choice).

        One that raises gives its exception as the choice.
        """
        if in_flight.logits is None:
            return
        groups: dict[TokenSampler, list[tuple[Request, int]]] = {}
        for row, index in in_flight.sampling:
            if row.request not in in_flight.sampled_index:
                groups.setdefault(row.request.sampler or self._sampler, []).append((row.request, index))
        for sampler, members in groups.items():
            members = [member for member in members if not member[0].finished]  # what a callback has aborted by now
            if not members:
                continue
            requests = [request for request, _ in members]
            logits = _picked(in_flight.logits, [index for _, index in members])
            try:
                sampled = sampler.sample(requests, self._processed(requests, logits))
                if len(sampled.token_ids) != len(requests):
                    raise ValueError(f"{sampler!r} gave {len(sampled.token_ids)} tokens for {len(requests)} requests")
            except Exception as error:
                yield requests, logits, error
            else:
                yield requests, logits, sampled

    def _processed(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        concerned = [p for p in self._processors if any(_concerns(p, request) for request in requests)]
        if concerned:
            logits = logits.float().clone()  # log-probabilities are those of the raw ones
        for processor in concerned:
            logits = processor.process(requests, logits)
        return logits


def _concerns(processor: LogitsProcessor, request: Request) -> bool:
    """Whether a processor would change anything for a request; see `LogitsProcessor`."""
    concerns = getattr(processor, "concerns", None)
    return concerns is None or concerns(request)


def _picked(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if rows and rows[-1] == len(rows) - 1:  # they are in order, so these are the first ones
        return logits[: len(rows)]
    return logits[rows]
