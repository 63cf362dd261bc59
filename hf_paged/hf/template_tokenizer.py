"""A tokenizer of which chat templates get to see the special tokens alone. It is imported without torch."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class TemplateTokenizer:
    """Applies chat templates as Transformers does; it has none of its own."""

    chat_template = None
    apply_chat_template = PreTrainedTokenizerBase.apply_chat_template
    get_chat_template = PreTrainedTokenizerBase.get_chat_template

    def __init__(self, special_tokens: Mapping[str, str]) -> None:
        self.special_tokens_map = special_tokens
