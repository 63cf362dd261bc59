"""Log-probabilities of output and prompt tokens, of the raw distribution."""

from __future__ import annotations

import torch

from hf_paged.batch import Scheduled
from hf_paged.request import Logprob, Request


def top_logprobs(logits: torch.Tensor, token: int, count: int) -> dict[int, Logprob]:
    """The token's log-probability and those of the `count` most likely ones (-1: all), the token's first.

    Args:
        logits: [vocabulary], as the model gave them.
    """
    # A copy: where a row begins in memory decides in what order its sum is made on a GPU.
    values = logits.to(torch.float32, copy=True).log_softmax(-1)
    own = values[token]
    rank = int((values > own).sum()) + 1
    best, ids = values.topk(values.numel() if count == -1 else min(count, values.numel()))
    found = {token: Logprob(float(own), rank)}
    for position, (value, index) in enumerate(zip(best.tolist(), ids.tolist(), strict=True)):
        found.setdefault(index, Logprob(value, position + 1))
    return found


def add_output_logprobs(request: Request, logits: torch.Tensor, token: int) -> None:
    """Record the log-probabilities of a token that was just chosen, if the request asks for them."""
    if request.params.logprobs is None:
        return
    entry = top_logprobs(logits, token, request.params.logprobs)
    if request.logprobs is None:
        request.logprobs = []
    request.logprobs.append(entry)
    request.cumulative_logprob = (request.cumulative_logprob or 0.0) + entry[token].logprob


def add_prompt_logprobs(row: Scheduled, logits: torch.Tensor) -> None:
    """Record the log-probabilities of the prompt tokens that follow the row's own.

    Args:
        logits: [row.count, vocabulary]; the logits at token i rate token i + 1.
    """
    request, count = row.request, row.request.params.prompt_logprobs
    assert count is not None
    assert request.prompt_logprobs is not None
    for offset in range(row.count):
        following = row.start + offset + 1
        known = len(request.prompt_logprobs)
        if following < known or following >= len(request.prompt_token_ids):  # computed again, or no prompt token
            continue
        if following > known:
            raise RuntimeError(f"prompt token {known} of request {request.request_id!r} has no logits")
        request.prompt_logprobs.append(top_logprobs(logits[offset], request.prompt_token_ids[following], count))
