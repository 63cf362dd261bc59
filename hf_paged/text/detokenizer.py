"""Token ids -> text, piece by piece."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from hf_paged.params import SamplingParams

# Prompt tokens that the first pieces are decoded with: the text of a token depends on the token before it.
_CONTEXT = 6


class Detokenizer:
    """Decodes a growing sequence; text that may still change with the next token is held back.

    The text of new tokens is what decoding them after a few earlier ones adds. A character whose bytes are not all
    there yet decodes to U+FFFD.

    Attributes:
        opens: the tokens before the output are no text, so that a decoder may strip the output's leading space.

    Args:
        tokenizer: the model's.
        prompt: ids before the output.
        params: how special tokens are treated.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], params: SamplingParams) -> None:
        self._ids = list(prompt[-_CONTEXT:])
        self._from, self._read = 0, len(self._ids)
        self._decoder = _decoder(tokenizer, params)
        self.opens = not self._decode(0, self._read)

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text of `ids`, and of what was held back; `last`: hold nothing back."""
        self._ids.extend(ids)
        before = self._decode(self._from, self._read)
        now = self._decode(self._from, len(self._ids))
        if now.endswith("�") and not last:
            return ""
        self._from, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, begin: int, end: int) -> str:
        return self._decoder(self._ids[begin:end])


def _decoder(tokenizer: Any, params: SamplingParams) -> Callable[[list[int]], str]:
    """The tokenizer's `decode` with the request's options.

    A server calls it twice a token. Where Transformers' own methods would only hand the ids on to the Rust tokenizer,
    that is asked directly, for a quarter of the time.
    """
    plain = hasattr(tokenizer, "backend_tokenizer") and all(
        getattr(getattr(type(tokenizer), name, None), "__module__", "").startswith("transformers.tokenization_utils")
        for name in ("decode", "_decode")
    )
    if plain and not tokenizer.clean_up_tokenization_spaces and params.spaces_between_special_tokens:
        return functools.partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=params.skip_special_tokens)
    options = {"skip_special_tokens": params.skip_special_tokens}
    if not params.spaces_between_special_tokens:
        options["spaces_between_special_tokens"] = False
    return functools.partial(tokenizer.decode, **options)
