"""Renders the chat templates of calls: the program of the processes in `request_templates`, see `hf_paged.disposable`.

The first frame is the tokenizer's special tokens and the limit of a text. The others are the arguments of
`templates.render`, and each answer is an outcome and a text. All of them are msgpack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_paged.errors import ConfigError, InvalidRequestError
from hf_paged.text.templates import render


class _Tokenizer:
    """As much of the model's tokenizer as a template gets to see: its special tokens."""

    chat_template = None
    apply_chat_template = PreTrainedTokenizerBase.apply_chat_template
    get_chat_template = PreTrainedTokenizerBase.get_chat_template

    def __init__(self, special_tokens: Mapping[str, str]) -> None:
        self.special_tokens_map = special_tokens


def answerer(first: bytes) -> Callable[[bytes], bytes]:
    """See `hf_paged.disposable`."""
    given = msgspec.msgpack.decode(first)

    def answer(frame: bytes) -> bytes:
        # A new tokenizer for each call: `render` caches what it knows of a template with the tokenizer.
        tokenizer = _Tokenizer(given["special_tokens"])
        outcome, text = _outcome(tokenizer, msgspec.msgpack.decode(frame))
        if len(text) > given["most"]:
            outcome, text = "limit", f"becomes more than {given['most']} characters"
        try:
            return msgspec.msgpack.encode((outcome, text))
        except UnicodeEncodeError:
            return msgspec.msgpack.encode(("limit", "writes half of a surrogate pair, which is no Unicode"))

    return answer


def _outcome(tokenizer: _Tokenizer, call: dict[str, Any]) -> tuple[str, str]:
    try:
        return "text", render(tokenizer, **call)
    except ConfigError as error:
        return "option", str(error)
    except InvalidRequestError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        return "refused", str(error)
