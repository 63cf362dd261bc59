"""The functions that a call may call: what that asks of the answer, and the calls in it, told apart from its text."""

from __future__ import annotations

from collections import abc
from typing import Any

from hf_paged.server.protocol.chat import NamedTool, Tool
from hf_paged.server.text.forced import CallDelta, CallList, NamedCall
from hf_paged.server.text.stream import Piece
from hf_paged.server.text.tools import ToolParser


class ToolUse:
    """The tools of a call.

    Args:
        tools: there are. choice: of them. parallel: several calls may be made; else the first counts.
        form: see `ToolParser`.
    """

    def __init__(
        self, tools: abc.Sequence[Tool], choice: str | NamedTool | None, parallel: bool | None, form: str
    ) -> None:
        self.parallel = parallel is not False
        self._tools = tools if choice != "none" else ()
        self._named = choice.function.name if isinstance(choice, NamedTool) else None
        self._required = choice == "required"
        self._form = form

    def constraint(self) -> dict[str, Any] | None:
        """The constraint of a choice that forces a call: the JSON schema of its arguments, or of a list of calls."""
        schemas = [(tool.function.name, tool.function.parameters or {"type": "object"}) for tool in self._tools]
        if self._named is not None:
            return {"json": next(schema for name, schema in schemas if name == self._named)}
        if not self._required:
            return None
        calls = [
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [name]}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name, schema in schemas
        ]
        schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        return {"json": schema if self.parallel else schema | {"maxItems": 1}}

    def reader(self) -> ToolReader:
        """What reads one answer."""
        names = [tool.function.name for tool in self._tools]
        forced: NamedCall | CallList | None = None
        if self._named is not None:
            forced = NamedCall(self._named)
        elif self._required:
            forced = CallList(names, None if self.parallel else 1)
        return ToolReader(forced, ToolParser(names, self._form), self.parallel)


class ToolReader:
    """Takes the calls out of the pieces of one answer.

    Args:
        forced: reads an answer that is calls alone, or None.
        parser: finds calls in another one.
        parallel: several calls may be made; else the first counts.
    """

    def __init__(self, forced: NamedCall | CallList | None, parser: ToolParser, parallel: bool) -> None:
        self._forced = forced
        self._parser = parser
        self._parallel = parallel
        self._num_calls = 0

    def read(self, piece: Piece) -> None:
        """Move what is of calls from the piece's text to its `calls` and `deltas`."""
        last = piece.finish_reason is not None
        if self._forced is not None:
            piece.text, piece.calls, piece.deltas = self._forced.add(piece.text, last=last)
        else:  # calls among text are reported when complete
            piece.text, calls = self._parser.add(piece.text, last=last)
            piece.calls = calls if self._parallel else calls[: 1 - self._num_calls]
            piece.deltas = [CallDelta(self._num_calls + i, one.arguments, one) for i, one in enumerate(piece.calls)]
        self._num_calls += len(piece.calls)
        if self._num_calls and piece.finish_reason == "stop":
            piece.finish_reason = "tool_calls"
