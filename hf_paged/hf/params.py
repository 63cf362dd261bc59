"""The ids that a model's configs give a meaning."""

from __future__ import annotations

from transformers import PreTrainedModel


def special_ids(model: PreTrainedModel) -> set[int]:
    """The ids that a model's configs give a meaning."""
    configs = (model.config.get_text_config(decoder=True), model.config, model.generation_config)
    named = (value for c in configs for name, value in vars(c).items() if name.endswith(("token_id", "token_index")))
    found = {one for value in named for one in (value if isinstance(value, list) else [value])}
    return {one for one in found if isinstance(one, int)}
