"""TextStream: deltas in, pieces of text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hf_paged.params import SamplingParams
from hf_paged.server.messages import Delta, TokenLogprobs
from hf_paged.server.text.forced import CallDelta
from hf_paged.server.text.tools import ParsedCall
from hf_paged.text.output import OutputText
from hf_paged.text.tokens import TokenTexts


@dataclasses.dataclass
class Piece:
    """What is new of one sequence.

    Attributes:
        text: to be shown now; what may turn out to begin a stop string is held back.
        calls: tool calls that are over. deltas: what is new of calls; see `routes.tool_use.ToolReader`.
        tokens: those that count, up to a stop string's last one.
        logprobs: of these tokens, where asked for. prompt_logprobs: once, where asked for.
        bytes: what each of these tokens adds to the output's text, where log-probabilities are asked for.
        cached: prompt tokens that the prefix cache gave; once.
        finish_reason, stop_reason: at the end.
    """

    text: str = ""
    calls: list[ParsedCall] = dataclasses.field(default_factory=list)
    deltas: list[CallDelta] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    bytes: list[bytes] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached: int | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TextStream:
    """Makes pieces of one sequence's deltas.

    Args:
        texts: of the model's tokens; None: there is no text.
        prompt, params, eos: as for `OutputText`.
    """

    def __init__(
        self, texts: TokenTexts | None, prompt: Sequence[int], params: SamplingParams, eos: frozenset[int] = frozenset()
    ) -> None:
        self._texts = texts
        self._output = OutputText(None if texts is None else texts.tokenizer, prompt, params, eos)
        self._skipped = texts.special if texts is not None and params.skip_special_tokens else frozenset()
        self._opens = self._output.opens
        self._shown = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that count so far."""
        return self._output.num_tokens

    def add(self, delta: Delta) -> Piece:
        """What a delta adds. A piece with a finish reason is the last, though the delta may not be."""
        output, finish = self._output, delta.finish
        used = output.add(delta.tokens, finish)
        ended = output.stop is not None
        text = output.text
        end = len(text) if finish is not None else max(self._shown, len(text) - output.held_back(self._shown))
        piece = Piece(
            text=text[self._shown : end],
            tokens=delta.tokens[:used],
            logprobs=None if delta.logprobs is None else delta.logprobs[:used],
            prompt_logprobs=delta.prompt_logprobs,
            cached=delta.cached,
            finish_reason="stop" if ended else finish,
            stop_reason=output.stop if ended else delta.stop_reason,
        )
        self._shown = end
        piece.bytes = self._bytes_of(piece)
        return piece

    def _bytes_of(self, piece: Piece) -> list[bytes]:
        """What each of the piece's tokens adds to the text, where log-probabilities are asked for."""
        found: list[bytes] = []
        if piece.logprobs is None or self._texts is None:
            return found
        for number, token in enumerate(piece.tokens):
            ends = piece.finish_reason == "stop" and number == len(piece.tokens) - 1 and token in self._output.ends
            hidden = ends or token in self._skipped
            found.append(b"" if hidden else self._texts.bytes_of(token, opens=self._opens))
            self._opens = self._opens and not found[-1]
        return found
