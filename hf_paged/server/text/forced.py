"""Forced tool calls: the whole answer is calls, by a constraint, so that they are known while they are written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from typing import Any

from hf_paged.server.text.tools import ParsedCall, ToolParser


@dataclasses.dataclass
class CallDelta:
    """What is new of a call, as a stream tells it.

    Attributes:
        index: which of the answer's calls it is.
        arguments: more of their text.
        begun: the call, where this is its beginning.
    """

    index: int
    arguments: str = ""
    begun: ParsedCall | None = None

    def body(self) -> dict[str, Any]:
        """As the chat endpoint streams it."""
        function = {"arguments": self.arguments}
        if self.begun is None:
            return {"index": self.index, "function": function}
        return dataclasses.replace(self.begun, arguments=self.arguments).body(self.index)


class NamedCall:
    """The call of a function whose arguments are the whole text.

    Args:
        name: the function's.
    """

    def __init__(self, name: str) -> None:
        self._call = ParsedCall(name, "")
        self._begun = False

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[ParsedCall], list[CallDelta]]:
        """What text adds: text to show, calls that are over, and what is new of calls; `last`: no more comes."""
        self._call.arguments += text
        delta = CallDelta(0, text, None if self._begun else self._call)
        new = bool(text) or not self._begun
        self._begun = True
        return "", [self._call] if last else [], [delta] if new else []


_NAME = re.compile(r'\s*(?:\[|\}\s*,)\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")')  # of the first call, or the next one
_LONGEST = 2048  # limit on the text before a call's arguments, in characters; a longer one is not a call
_KEY = re.compile(r'\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\S)')


class CallList:
    """The calls of a text that is `[{"name": …, "parameters": {…}}, …]`, each told from its name on.

    Arguments are the text that was written. A call that is cut short is one with the arguments so far. A text that
    doesn't begin like this is left to `ToolParser` at its end; what follows the calls is dropped.

    Args:
        names: functions there are.
        most: calls that count, or None: all.
    """

    def __init__(self, names: Collection[str], most: int | None = None) -> None:
        self._names = names
        self._most = most
        self._text = ""  # not parsed yet
        self._in_vain = 0  # length of the text when the last search found nothing
        self._count = 0
        self._call: ParsedCall | None = None  # the one that is being written
        self._value: _JSONValue | None = None  # its arguments, once they begin

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[ParsedCall], list[CallDelta]]:
        self._text += text
        over: list[ParsedCall] = []
        new: dict[int, CallDelta] = {}
        while self._begin(new) or self._end(new, over):
            pass
        if not last:
            return "", over, list(new.values())
        if self._call is not None:
            over.append(self._call)
        return ("", over, list(new.values())) if self._count else self._otherwise()

    def _begin(self, new: dict[int, CallDelta]) -> bool:
        """Whether a call begins: its name is known."""
        if self._call is not None or self._count == self._most:
            return False
        found = self._match(_NAME)
        if found is None:
            return False
        name = _string(found[1])
        if name not in self._names:
            return False
        self._take(found.end())
        self._call = ParsedCall(name, "")
        new[self._count] = CallDelta(self._count, begun=self._call)
        self._count += 1
        return True

    def _end(self, new: dict[int, CallDelta], over: list[ParsedCall]) -> bool:
        """Take in arguments, as far as they go; whether they are complete."""
        if self._call is None:
            return False
        if self._value is None:
            found = self._match(_KEY)
            if found is None:
                return False
            self._take(found.end())
            self._value = _JSONValue()
        written = self._take(self._value.take(self._text))
        if written:
            self._call.arguments += written
            new.setdefault(self._count - 1, CallDelta(self._count - 1)).arguments += written
        if not self._value.complete:
            return False
        over.append(self._call)
        self._call = self._value = None
        return True

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The pattern at the beginning of the text. A text that was too long for it before isn't looked at again."""
        found = pattern.match(self._text) if self._in_vain <= _LONGEST else None
        self._in_vain = len(self._text)
        return found

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        self._in_vain = 0
        return taken

    def _otherwise(self) -> tuple[str, list[ParsedCall], list[CallDelta]]:
        text, calls = ToolParser(self._names, "json").add(self._text, last=True)
        calls = calls[: self._most]
        return text, calls, [CallDelta(index, call.arguments, call) for index, call in enumerate(calls)]


class _JSONValue:
    """Finds the end of a JSON value that comes in pieces, and begins with the first one.

    Attributes:
        complete: whether it was found.
    """

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._quoted = self._escaped = False

    def take(self, text: str) -> int:
        """Characters of `text` that are the value's."""
        for index, character in enumerate(text):
            inside = self._quoted or self._depth
            if not inside and (character in ",]}" or character.isspace()):  # a number or a word is over
                self.complete = True
                return index
            self._step(character)
            if inside and not self._quoted and not self._depth:
                self.complete = True
                return index + 1
        return len(text)

    def _step(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = character == "\\"
            self._quoted = character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "[{":
            self._depth += 1
        elif character in "]}":
            self._depth -= 1


def _string(text: str) -> Any:
    """What a JSON string says, or None: it is none."""
    try:
        return json.loads(text)
    except ValueError:  # no RecursionError: a string has no brackets
        return None
