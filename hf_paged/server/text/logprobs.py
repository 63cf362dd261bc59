"""Log-probabilities in the forms that the endpoints answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_paged.server.messages import TokenLogprobs
from hf_paged.server.text.stream import Piece
from hf_paged.text.tokens import TextOffset, TokenTexts, named

LEAST = -9999.0  # JSON has no minus infinity


class CompletionLogprobs:
    """Builds the `logprobs` of /v1/completions for one choice, piece by piece.

    Tokens are named by what they add to the choice's text, so that they join to it. What is no text of it, such as a
    special token that is skipped, is named all the same, and begins where the next one does.

    Args:
        texts: of the model's tokens.
        count: how many of the likeliest tokens to report.
    """

    def __init__(self, texts: TokenTexts, count: int) -> None:
        self._texts = texts
        self._count = count
        self._offset = TextOffset()

    def prompt(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], text: str) -> dict[str, Any]:
        """The part for an echoed prompt, whose text is `text`. Nothing is known of its first token: it has no entry."""
        return self._add(tokens, entries, self._texts.bytes_of_prompt(tokens, text))

    def output(self, piece: Piece) -> dict[str, Any]:
        """The part for the tokens of a piece."""
        return self._add(piece.tokens, piece.logprobs or [], piece.bytes)

    def _add(
        self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], pieces: Sequence[bytes]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, entry, piece in zip(tokens, entries, pieces, strict=True):
            name = named(piece) if piece else self._texts.name(token)
            found["text_offset"].append(self._offset.characters)
            self._offset.add(piece)
            found["tokens"].append(name)
            found["token_logprobs"].append(None if entry is None else finite(entry.logprobs[0]))
            found["top_logprobs"].append(None if entry is None else self._best(entry, name))
        return found

    def _best(self, entry: TokenLogprobs, own: str) -> dict[str, float]:
        """The likeliest tokens by name. Each name is there once: further tokens of the same text are `token_id:7`."""
        names = {entry.ids[0]: own}
        taken = {own}
        for token in entry.ids[1:]:
            name = self._texts.name(token)
            names[token] = f"token_id:{token}" if name in taken else name
            taken.add(name)
        return {names[token]: finite(value) for token, value in best_of(entry, self._count)}


def chat_logprobs(texts: TokenTexts, piece: Piece, count: int) -> dict[str, Any]:
    """The `logprobs` of /v1/chat/completions for the tokens of a piece. Their `bytes` join to the answer's text."""
    content = []
    for token, entry, own in zip(piece.tokens, piece.logprobs or [], piece.bytes, strict=True):
        best = [_shown(texts.name(i), value, texts.bytes_of(i)) for i, value in best_of(entry, count)]
        name = named(own) if own else texts.name(token)
        content.append(_shown(name, entry.logprobs[0], own) | {"top_logprobs": best})
    return {"content": content, "refusal": None}


def _shown(name: str, value: float, piece: bytes) -> dict[str, Any]:
    return {"token": name, "logprob": finite(value), "bytes": list(piece)}


def prompt_logprob(texts: TokenTexts, entry: TokenLogprobs | None) -> dict[str, Any] | None:
    """A position of the `prompt_logprobs` of vLLM's answers: token id -> its log-probability, rank and text."""
    if entry is None:
        return None
    return {
        str(token): {"logprob": finite(value), "rank": rank, "decoded_token": texts.name(token)}
        for token, value, rank in zip(entry.ids, entry.logprobs, entry.ranks, strict=True)
    }


def best_of(entry: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    """The `count` most likely tokens of an entry."""
    rated = sorted(zip(entry.ranks, entry.ids, entry.logprobs, strict=True))
    return [(token, value) for _, token, value in rated[: count if count >= 0 else None]]


def finite(value: float) -> float:
    """A log-probability that JSON can hold, NaN included."""
    return value if value > LEAST else LEAST
