"""An answer's text and its tool calls, told apart piece by piece."""

from __future__ import annotations

import dataclasses

from hf_paged.server.text.stream import Piece
from hf_paged.server.text.tools import ParsedCall, ToolParser


@dataclasses.dataclass
class ChatPart:
    """What a piece adds to an answer: text to show, calls that are complete, and how it ended."""

    text: str
    calls: list[ParsedCall]
    finish_reason: str | None


class ChatParts:
    """Divides the pieces of one answer into text and tool calls.

    Args:
        names: functions that may be called; none: all is text.
        form: see `ToolParser`.
        named: the function that the whole answer is the arguments of.
        whole: nothing is shown before the answer is complete: it is a list of calls.
        parallel: several calls may be made; else the first counts.
    """

    def __init__(self, names: list[str], form: str, *, named: str | None, whole: bool, parallel: bool) -> None:
        self._parser = ToolParser(names, "json" if whole else form) if names else None
        self._named = named
        self._held = ""
        self._parallel = parallel
        self.num_calls = 0

    def add(self, piece: Piece) -> ChatPart:
        """What a piece adds."""
        reason, last = piece.finish_reason, piece.finish_reason is not None
        if self._named is not None:
            self._held += piece.text
            if not last:
                return ChatPart("", [], None)
            self.num_calls = 1
            return ChatPart("", [ParsedCall(self._named, self._held)], "tool_calls" if reason == "stop" else reason)
        if self._parser is None:
            return ChatPart(piece.text, [], reason)
        text, calls = self._parser.add(piece.text, last=last)
        if not self._parallel:
            calls = calls[: 1 - self.num_calls]
        self.num_calls += len(calls)
        return ChatPart(text, calls, "tool_calls" if self.num_calls and reason == "stop" else reason)
