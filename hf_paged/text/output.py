"""OutputText: the text of an output, decoded as its tokens come, and cut at its first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_paged.params import SamplingParams
from hf_paged.request import Request
from hf_paged.text.detokenizer import Detokenizer


class OutputText:
    """Decodes one output and looks for its stop strings.

    A stop string is none of the text, unless `include_stop_str_in_output`; nor is an id that ends the output.

    Args:
        tokenizer: the model's; None: there is no text.
        prompt: ids before the output.
        params: with the stop strings, and how special tokens are treated.
        eos: ids that end the output, beside those of `params`.

    Attributes:
        text: what was decoded so far.
        num_tokens: tokens that count so far: up to a stop string's last one.
        stop: the stop string that was found.
        ends: ids that are no text where they end the output.
        opens: the tokens before the output are no text, so that a decoder may strip the output's leading space.
    """

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], params: SamplingParams, eos: frozenset[int] = frozenset()
    ) -> None:
        has_text = tokenizer is not None and params.detokenize
        self._detokenizer = Detokenizer(tokenizer, prompt, params) if has_text else None
        self._stops = tuple(params.stop or ()) if has_text else ()
        self._keep = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self.text = ""
        self.num_tokens = 0
        self.stop: str | None = None
        self.ends: frozenset[int] = frozenset()
        if not self._keep:
            self.ends = frozenset(params.stop_token_ids or ()).union(() if params.ignore_eos else eos)
        self.opens = self._detokenizer is not None and self._detokenizer.opens

    def add(self, ids: Sequence[int], finish: str | None = None) -> int:
        """Decode new tokens; how many of them count. After a stop string none do.

        Args:
            ids: the tokens.
            finish: the output's finish reason; None: it goes on, and text that may still change is held back.
        """
        if self.stop is not None:
            return 0
        spoken = ids[:-1] if finish == "stop" and ids and ids[-1] in self.ends else ids
        if not self._stops:
            self.num_tokens += len(ids)
            self._decode(spoken, last=finish is not None)
            return len(ids)
        for number, token in enumerate(spoken, 1):
            self.num_tokens += 1
            begins = len(self.text)
            self._decode([token], last=finish is not None and number == len(spoken))
            if self.num_tokens >= self._min_tokens and self._cut(begins):
                return number
        self.num_tokens += len(ids) - len(spoken)
        if not spoken:
            self._decode([], last=finish is not None)
        return len(ids)

    def stop_check(self, request: Request) -> str | None:
        """The stop string that the newest token of a request completes, if one does. A second call adds nothing."""
        # The engine doesn't ask before min_tokens, so several tokens may be new.
        self.add(request.token_ids[len(request.prompt_token_ids) + self.num_tokens :])
        return self.stop

    def held_back(self, shown: int) -> int:
        """Characters at the end of the text, after the first `shown` ones, that a stop string may begin with."""
        return 0 if self.stop is not None else overlap(self.text[shown:], self._stops)

    def _decode(self, ids: Sequence[int], *, last: bool) -> None:
        if self._detokenizer is not None and (ids or last):
            self.text += self._detokenizer.add(ids, last=last)

    def _cut(self, begins: int) -> bool:
        """Cut the text at the first stop string that what comes after `begins` characters completes, if one does."""
        found = [(at, s) for s in self._stops if (at := self.text.find(s, max(0, begins - len(s) + 1))) >= 0]
        if found:
            at, self.stop = min(found)
            self.text = self.text[: at + len(self.stop) * self._keep]
        return bool(found)


def overlap(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of `text` that one of the marks may begin with."""
    most = min(max(map(len, marks), default=1) - 1, len(text))
    return next((n for n in range(most, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
