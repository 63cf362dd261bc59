"""Recovery from a failed step: isolate the request at fault, or make steps smaller."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hf_paged.batch import Step
from hf_paged.errors import InvalidRequestError, is_out_of_memory

if TYPE_CHECKING:
    from hf_paged.engine.engine import Engine

logger = logging.getLogger(__name__)

SMALLEST_STEP = 64  # tokens; a step that is smaller is not halved when the memory runs out


def recover(engine: Engine, step: Step, error: Exception) -> None:
    """A step raised: fail the request that is alone, else try its requests again in two halves.

    Out of memory, steps are smaller from now on. Requests keep their tokens; what was computed for them is computed
    again.
    """
    requests = [row.request for row in step.rows if not row.request.finished]
    engine.restart()
    if is_out_of_memory(error) and shrink(engine, step.num_tokens, error):
        return
    if len(step.rows) == 1:
        for request in requests:
            engine.outputs.finish(request, "error", error=error)
    elif len(requests) == 1:  # a row that has ended meanwhile may be at fault
        engine.scheduler.serve_apart(requests)
    else:
        middle = len(requests) // 2
        engine.scheduler.serve_apart(requests[:middle], requests[middle:])


def shrink(engine: Engine, tokens: int, error: Exception) -> bool:
    """Out of memory at `tokens` per step: halve the token budget, unless it is already at the minimum.

    Returns:
        Whether it was halved.
    """
    half = tokens // 2
    if half < SMALLEST_STEP:
        return False
    engine.runner.forget_graphs()
    engine.scheduler.max_num_batched_tokens = half
    engine.scheduler.max_num_seqs = min(engine.scheduler.max_num_seqs, half)
    if engine.model.spec.device.type == "cuda":
        torch.cuda.empty_cache()
    logger.warning("out of memory in a step of %d tokens; steps have %d at most from now on: %s", tokens, half, error)
    return True


def retry_smaller(engine: Engine, work: Callable[[int], None]) -> None:
    """Call `work` with the token budget of a step; out of memory, halve the budget and call it again.

    Raises:
        what it raises, if that is something else, or steps can't be smaller.
    """
    while True:
        tokens = engine.scheduler.max_num_batched_tokens
        try:
            return work(tokens)
        except Exception as error:
            if not is_out_of_memory(error) or not shrink(engine, tokens, error):
                raise


def refuse_too_long(engine: Engine) -> None:
    """Nothing could be scheduled. If no request holds a block, the next one never fits, for the pool can't grow."""
    if engine.scheduler.running or not engine.has_work:
        return
    request = engine.scheduler.first_ready()
    error = InvalidRequestError(
        f"request {request.request_id!r} has {len(request.token_ids)} tokens, more than the KV pool can hold "
        f"({engine.stats.num_blocks} blocks of {engine.config.block_size} tokens); shorten it, or free memory"
    )
    engine.outputs.finish(request, "error", error=error)
