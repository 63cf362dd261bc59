"""Log-probabilities in the forms that the endpoints answer with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_paged.server.messages import TokenLogprobs
from hf_paged.server.text.model_text import ModelText

LEAST = -9999.0  # JSON has no minus infinity


class CompletionLogprobs:
    """Builds the `logprobs` of /v1/completions for one choice, piece by piece."""

    def __init__(self, text: ModelText, count: int) -> None:
        self._text = text
        self._count = count
        self._offset = 0

    def add(self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The part for these tokens. An entry that is None: nothing is known of that token, the first of a prompt."""
        found: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, entry in zip(tokens, entries, strict=False):
            shown = self._text.token(token)
            found["text_offset"].append(self._offset)
            self._offset += len(shown)
            found["tokens"].append(shown)
            found["token_logprobs"].append(None if entry is None else finite(entry.logprobs[0]))
            top = None
            if entry is not None:
                best = best_of(entry, self._count)
                top = {self._text.token(i): finite(value) for i, value in best}
            found["top_logprobs"].append(top)
        return found


def chat_logprobs(text: ModelText, tokens: Sequence[int], entries: Sequence[TokenLogprobs], count: int) -> Any:
    """The `logprobs` of /v1/chat/completions for these tokens."""

    def shown(token: int, value: float) -> dict[str, Any]:
        word = text.token(token)
        return {"token": word, "logprob": finite(value), "bytes": list(word.encode("utf-8", "replace"))}

    content = [
        shown(token, entry.logprobs[0]) | {"top_logprobs": [shown(*one) for one in best_of(entry, count)]}
        for token, entry in zip(tokens, entries, strict=False)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    text: ModelText, entries: Sequence[TokenLogprobs | None] | None
) -> list[dict[str, Any] | None] | None:
    """The `prompt_logprobs` of vLLM's answers: for each prompt token id -> its log-probability, rank and text."""
    if entries is None:
        return None
    return [None if entry is None else _by_id(text, entry) for entry in entries]


def _by_id(text: ModelText, entry: TokenLogprobs) -> dict[str, Any]:
    return {
        str(token): {"logprob": finite(value), "rank": rank, "decoded_token": text.token(token)}
        for token, value, rank in zip(entry.ids, entry.logprobs, entry.ranks, strict=True)
    }


def best_of(entry: TokenLogprobs, count: int) -> list[tuple[int, float]]:
    """The `count` most likely tokens of an entry."""
    rated = sorted(zip(entry.ranks, entry.ids, entry.logprobs, strict=True))
    return [(token, value) for _, token, value in rated[: count if count >= 0 else None]]


def finite(value: float) -> float:
    """A log-probability that JSON can hold."""
    return max(value, LEAST)
