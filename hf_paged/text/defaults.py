"""What a model's generation config, and its tokenizer, say of sampling and of the end of an output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_paged.params import SamplingParams

DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(config: Any) -> dict[str, Any]:
    """The fields of SamplingParams that a generation config sets: the server's defaults."""
    return {name: value for name in DEFAULTED if (value := getattr(config, name, None)) is not None}


def default_params(config: Any) -> SamplingParams:
    """What Transformers' own `generate()` would do with a generation config: the defaults of `LLM`."""
    given = sampling_defaults(config)
    if not config.do_sample:
        given["temperature"] = 0.0
    if config.max_new_tokens is not None:
        given["max_tokens"] = config.max_new_tokens
    return SamplingParams(**given)


def end_ids(ids: int | Iterable[int] | None, tokenizer: Any = None) -> frozenset[int]:
    """The ids that end an output: a generation config's `eos_token_id`, which may be a list, and the tokenizer's."""
    found = set(ids if isinstance(ids, Iterable) else [ids])
    if tokenizer is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(i for i in found if i is not None)
