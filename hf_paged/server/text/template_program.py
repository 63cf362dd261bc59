"""Renders the chat templates of calls: the program of the processes in `request_templates`, see `hf_paged.disposable`.

The first frame is the tokenizer's special tokens and the limit of a text. The others are the arguments of
`templates.render`, and each answer is an outcome and a text. All of them are msgpack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from hf_paged.errors import ConfigError, InvalidRequestError
from hf_paged.hf.template_tokenizer import TemplateTokenizer
from hf_paged.text.templates import render


def answerer(first: bytes) -> Callable[[bytes], bytes]:
    """What `disposable` calls with each frame: renders a template. `first` holds the tokenizer's special tokens."""
    given = msgspec.msgpack.decode(first)

    def answer(frame: bytes) -> bytes:
        # A new tokenizer for each call: `render` caches what it knows of a template with the tokenizer.
        tokenizer = TemplateTokenizer(given["special_tokens"])
        outcome, text = _outcome(tokenizer, msgspec.msgpack.decode(frame))
        if len(text) > given["most"]:
            outcome, text = "limit", f"becomes more than {given['most']} characters"
        try:
            return msgspec.msgpack.encode((outcome, text))
        except UnicodeEncodeError:
            return msgspec.msgpack.encode(("limit", "writes half of a surrogate pair, which is no Unicode"))

    return answer


def _outcome(tokenizer: TemplateTokenizer, call: dict[str, Any]) -> tuple[str, str]:
    try:
        return "text", render(tokenizer, **call)
    except ConfigError as error:
        return "option", str(error)
    except InvalidRequestError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from None
        return "refused", str(error)
