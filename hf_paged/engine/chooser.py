"""Who chooses each row's token, and when: on the device as the step is launched, or on the host when it lands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hf_paged.engine.batch import wants_prompt_logprobs
from hf_paged.engine.flight import ChosenTokens, Flight
from hf_paged.engine.sampler import BatchSampler, needs_history
from hf_paged.protocols import LogitsProcessor, TokenSampler
from hf_paged.types import Request, Sampled, Scheduled

Choice = tuple[list[Request], torch.Tensor, "Sampled | Exception"]


class Chooser:
    """Chooses tokens for the requests of an engine.

    Args:
        sampler: serves requests without a sampler of their own.
        processors: run on the logits before any sampler, in order.
        ahead: whether tokens are chosen at launch, where they can be.
    """

    def __init__(self, sampler: BatchSampler, processors: Sequence[LogitsProcessor], *, ahead: bool) -> None:
        self._sampler = sampler
        self._processors = tuple(processors)
        self._ahead = ahead and not any(getattr(processor, "needs_tokens", True) for processor in processors)

    def runs_ahead(self, request: Request) -> bool:
        """Whether its tokens can be chosen at launch: nothing of them, or of the tokens before, is asked of the host."""
        params = request.params
        plain = params.logprobs is None and params.prompt_logprobs is None and not needs_history(request)
        return self._ahead and request.sampler is None and plain

    def launch(self, flight: Flight, logits: torch.Tensor) -> None:
        """Choose what can be chosen now, and keep the logits that are needed when the step lands.

        Args:
            logits: [S, vocabulary] of the flight's batch; the next forward may overwrite them.
        """
        flight.sampling = _sampled_rows(flight.step.rows)
        ours = [(row.request, index) for row, index in flight.sampling if row.request.runs_ahead]
        if ours:
            requests = [request for request, _ in ours]
            own = self._processed(requests, _picked(logits, [index for _, index in ours]))
            flight.chosen = ChosenTokens(self._sampler.launch(requests, own))
            flight.places = {request: place for place, request in enumerate(requests)}
        if len(ours) < len(logits):
            flight.logits = logits.clone() if self._ahead else logits

    def land(self, flight: Flight) -> Iterator[Choice]:
        """What the other rows' samplers choose, each for its own requests in one go: (requests, logits, choice).

        One that raises gives its exception as the choice.
        """
        if flight.logits is None:
            return
        groups: dict[TokenSampler, list[tuple[Request, int]]] = {}
        for row, index in flight.sampling:
            if row.request not in flight.places:
                groups.setdefault(row.request.sampler or self._sampler, []).append((row.request, index))
        for sampler, members in groups.items():
            members = [member for member in members if not member[0].finished]  # what a callback has aborted by now
            requests = [request for request, _ in members]
            logits = _picked(flight.logits, [index for _, index in members])
            try:
                sampled = sampler.sample(requests, self._processed(requests, logits))
                if len(sampled.token_ids) != len(requests):
                    raise ValueError(f"{sampler!r} gave {len(sampled.token_ids)} tokens for {len(requests)} requests")
            except Exception as error:
                yield requests, logits, error
            else:
                yield requests, logits, sampled

    def _processed(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        if self._processors:
            logits = logits.float().clone()  # log-probabilities are those of the raw ones
        for processor in self._processors:
            logits = processor.process(requests, logits)
        return logits


def _sampled_rows(rows: Sequence[Scheduled]) -> list[tuple[Scheduled, int]]:
    """The rows that sample, each with its row of the step's logits."""
    found, index = [], 0
    for row in rows:
        index += row.count - row.samples if wants_prompt_logprobs(row) else 0
        if row.samples:
            found.append((row, index))
            index += 1
    return found


def _picked(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if len(rows) == len(logits) else logits[rows]
