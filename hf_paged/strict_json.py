"""JSON of which every value can be carried on: through encoders, templates, tokenizers and other processes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

DEPTH = 128  # arrays and objects inside each other; what recurses over them has a stack of its own to think of
LOWEST, HIGHEST = -(2**63), 2**64 - 1
SMALL = 2**16  # characters; what a text of this size holds needs no counting
MOST_PARTS = 100_000  # whatever a text has that is no integer: keys, texts, arrays, objects, fractions, true, null
MOST_MEMBERS = 2**20  # members of its arrays and objects, integers too
_SHOWN = 24  # digits that an error shows of an integer
_TOO_DEEP = f"arrays and objects are nested more than {DEPTH} deep; send a flatter value"
_STEP = re.compile(r'["\[\]{}:]|[-+\d.eE,\s]{1,65536}|true|false|null|NaN|Infinity')
_LONG = re.compile(r"\d{100}")
_LITERALS = ("true", "false", "null", "NaN", "Infinity")
_PIECE = 2**20  # characters in which escapes are blanked at a time; other threads run in between

Path = list[str | int]


class StrictJSONError(ValueError):
    """A value that is JSON, or that Python takes for JSON, and can't be carried on.

    Args:
        path: keys and indices that lead to it.
        problem: what is wrong with it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(problem)
        self.path, self.problem = path, problem


def loads(text: str) -> Any:
    """The value of a text whose values can all be carried on.

    - Its own texts are Unicode, without halves of surrogate pairs.
    - Integers lie in -2^63 … 2^64-1, and other numbers are finite: no NaN, no Infinity, no 1e999.
    - Arrays and objects are at most `DEPTH` deep.
    - It has at most `MOST_PARTS` and `MOST_MEMBERS`. They are counted before anything is built, so that the decoder,
      which lets no other thread run, is done soon.

    Raises:
        StrictJSONError: it isn't so.
        json.JSONDecodeError: the text is no JSON.
    """
    if len(text) > SMALL:
        _measure(text)
    try:
        value = _decoded(text)
    except RecursionError as error:
        _measure(text)
        raise StrictJSONError([], _TOO_DEEP) from error
    _check(value)
    return value


def _decoded(text: str) -> Any:
    """The value of a text. Of an integer of too many digits to convert, the first ones are taken."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python converts no more than 4300 digits
        return json.loads(text, parse_int=lambda digits: int(digits[:_SHOWN]))


def _check(value: Any) -> None:
    """Raise for the first thing in a value that can't be carried on. No recursion: the value may be deep."""
    if problem := _problem(value):
        raise StrictJSONError([], problem)
    inside = [_entries(value)]
    path: Path = [""]
    while inside:
        key, entry = next(inside[-1], (None, None))
        if key is None:
            inside.pop()
            path.pop()
            continue
        path[-1] = key
        if problem := _problem(key) or _problem(entry):
            raise StrictJSONError(path, problem)
        if isinstance(entry, (dict, list)):
            if len(inside) == DEPTH:
                raise StrictJSONError(path, _TOO_DEEP)
            inside.append(_entries(entry))
            path.append("")


def _entries(value: Any) -> Iterator[tuple[str | int | None, Any]]:
    """The entries of an array or object, with their keys. Token ids, often many, are checked together."""
    if isinstance(value, dict):
        return iter(value.items())
    if not isinstance(value, list):
        return iter(())
    if set(map(type, value)) == {int} and min(value) >= LOWEST and max(value) <= HIGHEST:
        return iter(())
    return iter(enumerate(value))


def _problem(value: Any) -> str | None:
    """What is wrong with a value itself, whatever it holds."""
    if isinstance(value, str):
        return None if value.isascii() else _problem_of_text(value)
    if isinstance(value, float):
        return None if math.isfinite(value) else "a number is NaN or infinite; numbers have to be finite"
    if isinstance(value, int) and not LOWEST <= value <= HIGHEST:
        return f"the integer {str(value)[:_SHOWN]} is outside {LOWEST} to {HIGHEST}"
    return None


def _problem_of_text(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} is no Unicode: half of a surrogate pair, or a byte that is not UTF-8"
    return None


def _measure(text: str) -> None:
    """Raise where a text becomes too deep or has too many parts. It may be no JSON: then the decoder says so.

    The steps are short: a whole text, or a run of numbers.
    """
    blanked = _without_escapes(text)
    path: Path = []
    parts = members = at = 0
    key: tuple[int, int] | None = None  # where the last text is: a key, if a colon follows
    while step := _STEP.match(blanked, at):
        mark, at = step[0], step.end()
        if mark == ":":
            if path and key:
                path[-1] = text[slice(*key)]
            continue
        if mark in "]}":
            if not path:
                return
            path.pop()
            continue
        if mark in "[{":
            if len(path) == DEPTH:
                raise StrictJSONError(path, _TOO_DEEP)
            path.append(0 if mark == "[" else "")
        elif mark == '"':
            key = at, blanked.find('"', at)
            at = key[1] + 1
            if not at:
                return
        elif mark not in _LITERALS:
            commas = mark.count(",")
            members += commas
            if path and isinstance(path[-1], int):
                path[-1] += commas
            if members >= MOST_MEMBERS:
                raise StrictJSONError(path[:1], f"there are more than {MOST_MEMBERS} values up to here; send fewer")
            parts += sum(map(mark.count, ".eE")) - 1
            if len(mark) > 100 and _LONG.search(mark):  # takes time with the square of its digits
                parts += len(mark) // 16
        parts += 1
        if parts > MOST_PARTS:
            problem = f"there are more than {MOST_PARTS} keys, texts, arrays and objects up to here; send fewer"
            raise StrictJSONError(path[:1], problem)


def _without_escapes(text: str) -> str:
    """A text of the same length without backslashes and escaped quotes: each quote begins or ends a text."""
    if "\\" not in text:
        return text
    pieces = []
    at = 0
    while at < len(text):
        piece = text[at : at + _PIECE]
        if (len(piece) - len(piece.rstrip("\\"))) % 2:  # an escape is divided
            piece = text[at : at + _PIECE + 1]
        at += len(piece)
        pieces.append(piece.replace("\\\\", "..").replace('\\"', ".."))
    return "".join(pieces)
