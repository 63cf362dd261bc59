"""Token ids -> text, piece by piece, and stop strings in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_paged.params import SamplingParams
from hf_paged.types import Request

# Tokens of the prompt that the first pieces are decoded with: what a token reads as depends on the one before it.
_CONTEXT = 6


class Detokenizer:
    """Decodes a growing sequence; text that may still change with the next token is held back.

    The text of new tokens is what decoding them after a few earlier ones adds. A character whose bytes are not all
    there yet decodes to U+FFFD.

    Attributes:
        text: what was decoded so far.
        num_added: tokens of the output that were added.

    Args:
        tokenizer: the model's.
        prompt: ids before the output.
        params: how special tokens are treated.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], params: SamplingParams) -> None:
        self.text = ""
        self.num_added = 0
        self._ids = list(prompt[-_CONTEXT:])
        self._from, self._read = 0, len(self._ids)
        self._decoder = _decoder(tokenizer, params)

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text of `ids`, and of what was held back; `last`: hold nothing back."""
        self._ids.extend(ids)
        self.num_added += len(ids)
        before = self._decode(self._from, self._read)
        now = self._decode(self._from, len(self._ids))
        if now.endswith("�") and not last:
            return ""
        self._from, self._read = self._read, len(self._ids)
        piece = now[len(before) :]
        self.text += piece
        return piece

    def _decode(self, begin: int, end: int) -> str:
        return self._decoder(self._ids[begin:end])


def _decoder(tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> Callable[[list[int]], str]:
    """The tokenizer's `decode` with the request's options.

    A server calls it twice a token. Where Transformers' own methods would only hand the ids on to the Rust tokenizer,
    that is asked directly, for a quarter of the time.
    """
    plain = all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")
    )
    if plain and not tokenizer.clean_up_tokenization_spaces and params.spaces_between_special_tokens:
        return functools.partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=params.skip_special_tokens)
    options = {"skip_special_tokens": params.skip_special_tokens}
    if not params.spaces_between_special_tokens:
        options["spaces_between_special_tokens"] = False
    return functools.partial(tokenizer.decode, **options)


class StopStrings:
    """A request's stop check: looks for its stop strings in the text, and cuts the text there.

    Args:
        detokenizer: of the request.
        params: with the stop strings.
    """

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._stops = tuple(params.stop or ())
        self._keep = params.include_stop_str_in_output

    def __call__(self, request: Request) -> str | None:
        """The stop string that the newest token completes, if one does."""
        # Before min_tokens nobody asks; a stop string in there counts for nothing. Asked twice, nothing is added.
        first = len(request.prompt_token_ids) + self._detokenizer.num_added
        self._detokenizer.add(request.token_ids[first:-1])
        piece = self._detokenizer.add(request.token_ids[max(first, len(request.token_ids) - 1) :])
        text = self._detokenizer.text
        begins = len(text) - len(piece)
        found = [(at, stop) for stop in self._stops if (at := text.find(stop, max(0, begins - len(stop) + 1))) >= 0]
        if not found:
            return None
        at, stop = min(found)
        self._detokenizer.text = text[: at + len(stop) * self._keep]
        return stop


def banned_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of bad words, at the start of a text and after a space."""
    found = {
        tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False))
        for word in words
        for prefix in ("", " ")
    }
    return tuple(sorted(ids for ids in found if ids))
