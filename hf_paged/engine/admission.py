"""Admission: a request that could never be served is refused before it is queued."""

from __future__ import annotations

from collections.abc import Collection

from hf_paged.engine.pool import Pool
from hf_paged.errors import InvalidRequestError
from hf_paged.protocols import PagedModel
from hf_paged.request import Request


def check(request: Request, model: PagedModel, max_model_len: int | None, pool: Pool) -> None:
    """Refuse a request that could never be served.

    Args:
        request: the request; it is left as it is.
        model: knows which token ids there are.
        max_model_len: most tokens of a request, its output counted, or None.
        pool: has to hold the request when it is alone.

    Raises:
        InvalidRequestError: its prompt is empty, it names ids outside the vocabulary, its parent has another prompt, it
            is too long with its output, no token may be drawn as its first, or no plugin keeps its structured outputs.
    """
    if not request.prompt_token_ids:
        raise InvalidRequestError("the prompt is empty; give at least one token (a model's BOS id, for instance)")
    _check_ids(request, model)
    _check_parent(request)
    if request.params.structured_outputs is not None and request.constraint is None:
        raise InvalidRequestError("structured_outputs is set, but no plugin was asked to keep it")
    _check_choice(request, model)
    _check_length(request, max_model_len)
    pool.check_fits(len(request.prompt_token_ids), request.params.max_tokens)


def _check_ids(request: Request, model: PagedModel) -> None:
    check_ids("prompt", request.prompt_token_ids, model.vocab_size)
    named: dict[str, Collection[int]] = {
        "allowed_token_ids": request.params.allowed_token_ids or (),
        "logit_bias": request.params.logit_bias or (),
        "banned": [token for sequence in request.banned for token in sequence or (-1,)],
    }
    for name, ids in named.items():
        check_ids(name, ids, model.num_logits)  # a model may read more ids than it can write


def check_ids(name: str, ids: Collection[int], size: int) -> None:
    """Refuse ids outside [0, size).

    Raises:
        InvalidRequestError: one is outside; the message says which, and calls the ids `name`.
    """
    wrong = [token for token in (min(ids), max(ids)) if not 0 <= token < size] if ids else []
    if wrong:
        raise InvalidRequestError(
            f"token id {wrong[0]} in {name} is outside the vocabulary (0 to {size - 1}); use the model's own "
            "tokenizer, or resize_token_embeddings() after adding tokens"
        )


def _check_choice(request: Request, model: PagedModel) -> None:
    """Refuse a request whose constraints forbid every token from the start."""
    params = request.params
    forbidden = {sequence[-1] for sequence in request.banned if len(sequence) == 1}
    if request.num_output < params.min_tokens:
        forbidden.update(request.eos_token_ids, params.stop_token_ids or ())
    allowed = params.allowed_token_ids
    if all(token in forbidden for token in (range(model.num_logits) if allowed is None else allowed)):
        given = "the vocabulary" if allowed is None else f"allowed_token_ids={sorted(allowed)[:10]}"
        raise InvalidRequestError(
            f"no token may be drawn: bad_words and min_tokens={params.min_tokens} forbid all of {given}; allow others"
        )


def _check_parent(request: Request) -> None:
    parent = request.parent
    if parent is None:
        return
    same_prompt = list(parent.prompt_token_ids) == list(request.prompt_token_ids)
    if not same_prompt or parent.cache_key != request.cache_key:
        raise InvalidRequestError(
            f"parent {parent.request_id!r} has another prompt or cache_key; blocks can't be shared"
        )


def _check_length(request: Request, max_model_len: int | None) -> None:
    num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    least = num_prompt + (max_tokens or 1)
    if max_model_len is not None and least > max_model_len:
        raise InvalidRequestError(
            f"{num_prompt} prompt tokens and max_tokens={max_tokens} make {least}; the limit is {max_model_len} "
            "(the model's positions, or max_model_len); shorten one of them"
        )
