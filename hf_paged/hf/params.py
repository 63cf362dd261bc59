"""A model's generation config -> SamplingParams."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_paged.params import SamplingParams


def default_params(model: PreTrainedModel) -> SamplingParams:
    """What the model's generation config says, over SamplingParams' own defaults."""
    config = model.generation_config
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    if not config.do_sample:
        given["temperature"] = 0.0
    if config.max_new_tokens is not None:
        given["max_tokens"] = config.max_new_tokens
    return SamplingParams(**given)


def end_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The ids that end an output: the generation config's and the tokenizer's."""
    ids = model.generation_config.eos_token_id
    found = set(ids if isinstance(ids, (list, tuple)) else [ids])
    if tokenizer is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(i for i in found if i is not None)


def special_ids(model: PreTrainedModel) -> set[int]:
    """The ids that a model's configs give a meaning."""
    configs = (model.config.get_text_config(decoder=True), model.config, model.generation_config)
    named = (value for c in configs for name, value in vars(c).items() if name.endswith(("token_id", "token_index")))
    found = {one for value in named for one in (value if isinstance(value, list) else [value])}
    return {one for one in found if isinstance(one, int)}
