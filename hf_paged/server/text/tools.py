"""Tool calls in a model's text: found, parsed, and kept out of what is shown.

Three forms are known, which between them most chat templates ask for:

    hermes  <tool_call>{"name": …, "arguments": {…}}</tool_call>, several of them, text around    (Qwen, Hermes, SmolLM)
    json    the whole text is JSON: one object {"name": …, "parameters": {…}}, several behind one another or divided by
            semicolons, or a list; <|python_tag|> or [TOOL_CALLS] may stand before                (Llama 3, Mistral)
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Collection
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
_MARKS = ("<|python_tag|>", "[TOOL_CALLS]")
_BETWEEN = re.compile(r"[\s;,]*")
_decoder = json.JSONDecoder()


@dataclasses.dataclass
class ParsedCall:
    """A call as the model made it: its arguments are JSON text."""

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def body(self, index: int | None = None) -> dict[str, Any]:
        """As the chat endpoint answers; `index`: in a stream."""
        found: dict[str, Any] = {} if index is None else {"index": index}
        return found | {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class ToolParser:
    """Divides a growing text into what is shown and calls. What may turn out to be a call is held back.

    Args:
        names: functions there are; a call of another one is text.
        form: auto, hermes, json or none.
    """

    def __init__(self, names: Collection[str], form: str = "auto") -> None:
        self._names = names
        self._hermes = form in ("auto", "hermes") and bool(names)
        self._json = form in ("auto", "json") and bool(names)
        self._text = ""  # neither shown nor parsed yet
        self._shown = False

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[ParsedCall]]:
        """What of the text so far is to be shown now, and the calls that are complete; `last`: no more comes."""
        self._text += text
        if not self._shown and self._json and self._may_be_json():
            if not last:
                return "", []
            calls = self._all_json(self._text)
            if calls:
                self._text = ""
                return "", calls
        if self._hermes:
            shown, calls = self._take_hermes(last)
        else:
            shown, calls = self._take(len(self._text)), []
        self._shown = self._shown or bool(shown.strip()) or bool(calls)
        return shown, calls

    def _may_be_json(self) -> bool:
        """Whether the text, of which nothing was shown, can still become a call in JSON."""
        text = self._text.lstrip()
        begins = ("{", "[", *_MARKS)
        return not text or text.startswith(begins) or any(mark.startswith(text) for mark in _MARKS)

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        return taken

    def _take_hermes(self, last: bool) -> tuple[str, list[ParsedCall]]:
        shown = ""
        calls: list[ParsedCall] = []
        while (at := self._text.find(BEGIN)) >= 0:
            end = self._text.find(END, at)
            if end < 0 and not last:
                return shown + self._take(at), calls
            stop = len(self._text) if end < 0 else end
            call = self._one(self._text[at + len(BEGIN) : stop])
            after = min(len(self._text), stop + len(END))
            if call is None:
                shown += self._take(after)
            else:
                shown += self._take(at)
                self._take(after - at)
                calls.append(call)
        return shown + self._take(len(self._text) - (0 if last else _overlap(self._text, BEGIN))), calls

    def _one(self, text: str) -> ParsedCall | None:
        try:
            return self._call(json.loads(text))
        except ValueError:
            return None

    def _all_json(self, text: str) -> list[ParsedCall]:
        """The calls of a text that is nothing but calls, or none."""
        text = text.strip()
        for mark in _MARKS:
            text = text.removeprefix(mark).lstrip()
        values: list[Any] = []
        at = 0
        while at < len(text):
            try:
                value, at = _decoder.raw_decode(text, at)
            except ValueError:
                return []
            values += value if isinstance(value, list) else [value]
            between = _BETWEEN.match(text, at)
            at = between.end() if between else at
        calls = [self._call(value) for value in values]
        return [call for call in calls if call] if all(calls) else []

    def _call(self, value: Any) -> ParsedCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            return ParsedCall(value["name"], arguments)
        return ParsedCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` that `mark` may begin with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
