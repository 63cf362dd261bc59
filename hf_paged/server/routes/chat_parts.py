"""An answer's text and its tool calls, told apart piece by piece."""

from __future__ import annotations

import dataclasses

from hf_paged.server.text.forced import CallDelta, CallList, NamedCall
from hf_paged.server.text.stream import Piece
from hf_paged.server.text.tools import ParsedCall, ToolParser


@dataclasses.dataclass
class ChatPart:
    """What a piece adds to an answer: text to show, calls that are over, what is new of calls, and how it ended."""

    text: str
    calls: list[ParsedCall]
    deltas: list[CallDelta]
    finish_reason: str | None


class ChatParts:
    """Divides the pieces of one answer into text and tool calls.

    Args:
        names: functions that may be called; none: all is text.
        form: see `ToolParser`.
        named: the function that the whole answer is the arguments of.
        whole: the whole answer is a list of calls.
        parallel: several calls may be made; else the first counts.
    """

    def __init__(self, names: list[str], form: str, *, named: str | None, whole: bool, parallel: bool) -> None:
        self._parser = ToolParser(names, form) if names else None
        self._forced: NamedCall | CallList | None = None
        if named is not None:
            self._forced = NamedCall(named)
        elif whole:
            self._forced = CallList(names, None if parallel else 1)
        self._parallel = parallel
        self._num_calls = 0

    def add(self, piece: Piece) -> ChatPart:
        """What a piece adds."""
        reason, last = piece.finish_reason, piece.finish_reason is not None
        if self._forced is not None:
            text, calls, deltas = self._forced.add(piece.text, last=last)
        elif self._parser is not None:
            text, calls, deltas = self._found(self._parser, piece.text, last)
        else:
            text, calls, deltas = piece.text, [], []
        self._num_calls += len(calls)
        return ChatPart(text, calls, deltas, "tool_calls" if self._num_calls and reason == "stop" else reason)

    def _found(self, parser: ToolParser, text: str, last: bool) -> tuple[str, list[ParsedCall], list[CallDelta]]:
        """Calls that are found among text are told once they are complete."""
        text, calls = parser.add(text, last=last)
        if not self._parallel:
            calls = calls[: 1 - self._num_calls]
        return text, calls, [CallDelta(self._num_calls + i, call.arguments, call) for i, call in enumerate(calls)]
