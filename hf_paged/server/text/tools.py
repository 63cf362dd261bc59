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

from hf_paged.text.output import overlap

BEGIN, END = "<tool_call>", "</tool_call>"
_MARKS = ("<|python_tag|>", "[TOOL_CALLS]")
_BETWEEN = re.compile(r"[\s;,]*")
_decoder = json.JSONDecoder()
_NO_JSON = (ValueError, RecursionError)  # what a JSON decoder raises; RecursionError for deep nesting


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
        self._blank = 0  # leading white space counted so far, in characters
        self._held = False  # the text begins like JSON: nothing is shown before its end
        self._searched = 0  # characters already searched for a call's end

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[ParsedCall]]:
        """What of the text so far is to be shown now, and the calls that are complete; `last`: no more comes."""
        self._text += text
        if not self._shown and self._json and (self._held or self._may_be_json()):
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
        while self._blank < len(self._text) and self._text[self._blank].isspace():
            self._blank += 1
        self._held = self._text.startswith(("{", "[", *_MARKS), self._blank)
        begin = self._text[self._blank : self._blank + max(map(len, _MARKS))]
        return self._held or any(mark.startswith(begin) for mark in _MARKS)

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        return taken

    def _take_hermes(self, last: bool) -> tuple[str, list[ParsedCall]]:
        text, done = self._text, 0
        shown: list[str] = []
        calls: list[ParsedCall] = []
        while (begin := text.find(BEGIN, done)) >= 0:
            end = text.find(END, max(begin, self._searched))
            if end < 0 and not last:
                break
            stop = len(text) if end < 0 else end
            after = min(len(text), stop + len(END))
            call = self._one(text[begin + len(BEGIN) : stop])
            shown.append(text[done : begin if call else after])
            calls += [call] if call else []
            done = after
        if begin < 0:
            begin = max(done, len(text) - (0 if last else overlap(text, (BEGIN,))))
        shown.append(text[done:begin])
        self._text = text[begin:]
        self._searched = max(0, len(self._text) - len(END))
        return "".join(shown), calls

    def _one(self, text: str) -> ParsedCall | None:
        try:
            return self._call(json.loads(text))
        except _NO_JSON:
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
            except _NO_JSON:
                return []
            values += value if isinstance(value, list) else [value]
            between = _BETWEEN.match(text, at)
            at = between.end() if between else at
        calls: list[ParsedCall] = []
        for value in values:
            call = self._call(value)
            if call is None:
                return []
            calls.append(call)
        return calls

    def _call(self, value: Any) -> ParsedCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        try:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        except RecursionError:
            return None
        # JSON can hold half of a surrogate pair as an escape; UTF-8 can't.
        return ParsedCall(value["name"], text.encode("utf-8", "backslashreplace").decode())
