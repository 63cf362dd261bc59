"""What becomes of sampled tokens: they are appended to their requests, which go on, or end for a reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from hf_paged.engine import batch as batches
from hf_paged.engine.in_flight import InFlightStep
from hf_paged.engine.logprobs import add_output_logprobs, add_prompt_logprobs
from hf_paged.engine.scheduler import FCFSScheduler
from hf_paged.errors import InvalidRequestError
from hf_paged.request import FinishReason, Request, Sampled


class Outputs:
    """Keeps the requests of an engine, gives them their tokens, and ends them.

    Args:
        scheduler: forgets a request that ends.
        finished: told of each request that finished, after its blocks were freed.

    Attributes:
        requests: those that have not finished, by id.
    """

    def __init__(self, scheduler: FCFSScheduler, finished: Callable[[Request], None] | None) -> None:
        self.requests: dict[str, Request] = {}
        self._scheduler = scheduler
        self._told_finished = finished

    def carries(self, request: Request) -> bool:
        """Whether this very request was taken, and has not finished."""
        return self.requests.get(request.request_id) is request

    def append(self, request: Request, token: int, *, stop: bool = False) -> None:
        """Give a request its next token: it is told, or it ends. What its callbacks raise ends it too.

        Args:
            token: negative if no token may be drawn.
            stop: whether its sampler ends it with this token.
        """
        if request.finished:  # by a callback of a request before it in the step
            return
        if token < 0:
            self.finish(request, "error", error=_nothing_to_draw(request))
            return
        request.held = False
        request.token_ids.append(token)
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.monotonic()
        try:
            reason, what = _reason_to_stop(request, token, stop)
            if reason is None and request.on_token is not None:
                request.on_token(request)
        except Exception as error:
            self.finish(request, "error", error=error)
        else:
            if reason is not None:
                self.finish(request, reason, stop_reason=what)

    def append_all(self, requests: Sequence[Request], logits: torch.Tensor, choice: Sampled | Exception) -> None:
        """Give requests what a sampler chose, with log-probabilities: tokens, or None where the caller chooses.

        Args:
            logits: [rows, vocabulary], that it chose from.
        """
        if isinstance(choice, Exception):
            for request in requests:
                self.finish(request, "error", error=choice)
            return
        stopped = choice.stopped or [False] * len(requests)
        for request, row, token, stop in zip(requests, logits, choice.token_ids, stopped, strict=True):
            if request.finished:  # by a callback of a request before it
                continue
            if token is None:
                request.held = True
                continue
            try:
                if token >= 0:
                    add_output_logprobs(request, row, token)
            except Exception as error:
                self.finish(request, "error", error=error)
            else:
                self.append(request, token, stop=stop)

    def add_prompt_logprobs(self, in_flight: InFlightStep) -> None:
        """Keep the log-probabilities of the prompt tokens that a step computed, where they are asked for."""
        index = 0
        for row in in_flight.step.rows if in_flight.logits is not None else ():
            if batches.wants_prompt_logprobs(row):
                assert in_flight.logits is not None
                try:
                    add_prompt_logprobs(row, in_flight.logits[index : index + row.count])
                except Exception as error:  # concerns this request alone
                    self.finish(row.request, "error", error=error)
                index += row.count - row.samples
            index += row.samples

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        error: BaseException | None = None,
    ) -> None:
        """End a request: its blocks are free, then it is told. Does nothing for one that has finished."""
        if not self.carries(request):
            return
        request.finish_reason, request.stop_reason, request.error = reason, stop_reason, error
        request.held, request.num_ahead = False, 0
        request.metrics.finished_time = time.monotonic()
        self._scheduler.remove(request)
        del self.requests[request.request_id]
        if request.on_token is not None:
            try:
                request.on_token(request)
            except Exception as raised:
                request.error = request.error or raised
        if self._told_finished is not None:
            self._told_finished(request)


def _reason_to_stop(request: Request, token: int, stop: bool) -> tuple[FinishReason | None, str | int | None]:
    params = request.params
    complete = request.constraint is not None and request.constraint.advance(request)
    if request.num_output >= params.min_tokens:
        if token in request.eos_token_ids and not params.ignore_eos:
            return "stop", None
        if token in (params.stop_token_ids or ()):
            return "stop", token
        found = request.stop_check(request) if request.stop_check else None
        if found is not None:
            return "stop", found
    if complete:  # whatever its length: nothing can follow
        return "stop", None
    # A sampler that stops at the length too means that.
    if len(request.token_ids) >= request.limit:
        return "length", None
    return ("stop", None) if stop else (None, None)


def _nothing_to_draw(request: Request) -> InvalidRequestError:
    return InvalidRequestError(
        f"request {request.request_id!r}: no token may be drawn as token {request.num_output + 1} of the output; "
        "allowed_token_ids, bad_words, min_tokens and structured outputs together forbid all of them"
    )
