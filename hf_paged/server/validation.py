"""What pydantic found in a body -> one 400, about the field that the client got wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_paged.server.errors import APIError, invalid
from hf_paged.server.protocol.refused import REASONS

_INPUT = "Input should be "


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> APIError:
    """The 400 for the first problem.

    Of a union pydantic tells the problems of every branch, under the branch's own name. Those of the branch that the
    value comes closest to are taken, and names of branches are left out of the field.

    Args:
        errors: as FastAPI's RequestValidationError has them.
        body: that was sent, as far as it was JSON.
    """
    path, error = _first(errors, body)
    message = error["msg"].removeprefix("Value error, ")
    if not path and error["type"] == "model_attributes_type":
        return invalid(
            "the body is not taken for a JSON object; send one, with the header Content-Type: application/json"
        )
    if error["type"] == "misfit":
        return invalid(message, ".".join(map(str, [*path, error["ctx"]["field"]])))
    field = ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        if field in REASONS:
            return invalid(f"{field!r} is not supported: {REASONS[field]}", field, "unsupported_parameter")
        return invalid(f"{field!r} is not a field that this server honours; leave it out", field, "unknown_field")
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        message = f"{context['tag']} is not supported; supported: {context['expected_tags'].replace(chr(39), '')}"
    return invalid(f"{field}: {message}" if field else message, field or None)


def _first(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[list[str | int], Mapping[str, Any]]:
    """The first problem, and the keys and indices that lead to it in the body."""
    path: list[str | int] = []
    value, depth = body, 1 if errors[0]["loc"][:1] in (("body",), ("query",), ("path",)) else 0
    while True:
        error = errors[0]
        if len(error["loc"]) == depth:
            return path, error
        part = error["loc"][depth]
        if _leads_on(value, part, error, depth):
            errors = [other for other in errors if other["loc"][depth : depth + 1] == (part,)]
            value = value[part] if _has(value, part) else None
            path.append(part)
            depth += 1
            continue
        branches: dict[Any, list[Mapping[str, Any]]] = {}
        for other in errors:
            if len(other["loc"]) > depth:
                branches.setdefault(other["loc"][depth], []).append(other)
        depth += 1
        if all(len(other["loc"]) == depth for branch in branches.values() for other in branch):
            return path, {**error, "msg": _any_of([branch[0]["msg"] for branch in branches.values()])}
        errors = max(branches.values(), key=lambda branch: _closeness(branch, depth))


def _leads_on(value: Any, part: str | int, error: Mapping[str, Any], depth: int) -> bool:
    """Whether a part of an error's place is a key or an index of the value, and not the name of a union's branch."""
    missing = isinstance(value, dict) and error["type"] == "missing" and depth == len(error["loc"]) - 1
    return missing or _has(value, part)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _closeness(branch: Sequence[Mapping[str, Any]], depth: int) -> tuple[bool, int, int]:
    """How close the value comes to a branch: of the right type, then right for more of a list, then fewer problems."""
    right = all(len(error["loc"]) > depth for error in branch)
    index = branch[0]["loc"][depth] if right else 0
    return right, index if isinstance(index, int) else 0, -len(branch)


def _any_of(messages: Sequence[str]) -> str:
    """What a value may be, where it is of no branch's type; or what is wrong with it in the branch that it is of."""
    if others := [message for message in messages if not message.startswith(_INPUT)]:
        return others[0]
    return _INPUT + ", or ".join(dict.fromkeys(message.removeprefix(_INPUT) for message in messages))
