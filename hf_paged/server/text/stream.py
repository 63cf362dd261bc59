"""TextStream: new tokens in, text out, cut at stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hf_paged.params import SamplingParams
from hf_paged.server.messages import Delta, TokenLogprobs
from hf_paged.text.detokenizer import Detokenizer
from hf_paged.text.stops import find_stop, silent_ends
from hf_paged.text.tokens import TokenTexts


@dataclasses.dataclass
class Piece:
    """What is new of one sequence.

    Attributes:
        text: to be shown now; what may turn out to begin a stop string is held back.
        tokens: those that count, up to a stop string's last one.
        logprobs: of these tokens, where asked for. prompt_logprobs: once, where asked for.
        bytes: what each of these tokens adds to the output's text, where log-probabilities are asked for.
        cached: prompt tokens that the prefix cache gave; once.
        finish_reason, stop_reason: at the end.
    """

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    bytes: list[bytes] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached: int | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TextStream:
    """Decodes one sequence and looks for its stop strings.

    Args:
        texts: of the model's tokens.
        prompt: ids before the output.
        params: with the stop strings, and how special tokens are treated.
        eos: ids that end the output, beside those of `params`.

    Attributes:
        num_tokens: tokens that count so far.
    """

    def __init__(
        self, texts: TokenTexts, prompt: Sequence[int], params: SamplingParams, eos: frozenset[int] = frozenset()
    ) -> None:
        self.num_tokens = 0
        self._texts = texts
        self._skipped = texts.special if params.skip_special_tokens else frozenset()
        self._detokenizer = Detokenizer(texts.tokenizer, prompt, params) if params.detokenize else None
        self._opens = self._detokenizer is not None and self._detokenizer.opens
        self._stops = tuple(params.stop or ())
        self._keep = params.include_stop_str_in_output
        self._ends = silent_ends(params, eos)
        self._min_tokens = params.min_tokens
        self._shown = 0

    def add(self, delta: Delta) -> Piece:
        """What a delta adds. A piece with a finish reason is the last, though the delta may not be."""
        piece = Piece(
            tokens=delta.tokens,
            logprobs=delta.logprobs,
            prompt_logprobs=delta.prompt_logprobs,
            cached=delta.cached,
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
        )
        if self._detokenizer is None:
            self.num_tokens += len(delta.tokens)
            piece.bytes = self._bytes_of(piece)
            return piece
        found = self._decode(delta, self._detokenizer)
        if found is not None:
            at, stop, used = found
            piece.tokens = delta.tokens[:used]
            piece.logprobs = None if delta.logprobs is None else delta.logprobs[:used]
            piece.finish_reason, piece.stop_reason = "stop", stop
            end = at + len(stop) * self._keep
        else:
            text = self._detokenizer.text
            end = len(text) if delta.finish is not None else len(text) - self._held_back(text)
        piece.bytes = self._bytes_of(piece)
        piece.text = self._detokenizer.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _decode(self, delta: Delta, detokenizer: Detokenizer) -> tuple[int, str, int] | None:
        """Decode the delta's tokens; where a stop string begins, which one, and how many tokens it took."""
        last, tokens = delta.finish is not None, delta.tokens
        if delta.finish == "stop" and tokens and tokens[-1] in self._ends:
            tokens = tokens[:-1]
        if not self._stops:
            self.num_tokens += len(delta.tokens)
            if tokens or last:
                detokenizer.add(tokens, last=last)
            return None
        for number, token in enumerate(tokens):
            self.num_tokens += 1
            begins = len(detokenizer.text)
            detokenizer.add([token], last=last and number == len(tokens) - 1)
            found = find_stop(detokenizer.text, self._stops, begins) if self.num_tokens >= self._min_tokens else None
            if found is not None:
                return (*found, number + 1)
        self.num_tokens += len(delta.tokens) - len(tokens)
        if last and not tokens:
            detokenizer.add([], last=True)
        return None

    def _bytes_of(self, piece: Piece) -> list[bytes]:
        """What each of the piece's tokens adds to the text, where log-probabilities are asked for."""
        found: list[bytes] = []
        for number, token in enumerate(piece.tokens if piece.logprobs is not None else ()):
            ends = piece.finish_reason == "stop" and number == len(piece.tokens) - 1 and token in self._ends
            hidden = ends or token in self._skipped
            found.append(b"" if hidden else self._texts.bytes_of(token, opens=self._opens))
            self._opens = self._opens and not found[-1]
        return found

    def _held_back(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        for length in range(min(max(map(len, self._stops), default=1) - 1, len(text) - self._shown), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
