"""A conversation's messages, as chat templates want them: one function for `LLM.chat` and the server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_paged import strict_json
from hf_paged.errors import InvalidRequestError

ROLES = {"developer": "system", "function": "tool"}  # names that templates know
# Fields of answers that templates don't take; the code below reads what is needed of them.
_NOT_FOR_TEMPLATES = frozenset({"annotations", "audio", "function_call", "parsed", "refusal", "tool_calls"})
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def conversations_in(messages: Any) -> list[Any]:
    """Many conversations, from one message, one conversation, or many.

    Raises:
        InvalidRequestError: they are none; the message says which.
    """
    if isinstance(messages, Mapping) or hasattr(messages, "model_dump"):
        return [[messages]]
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InvalidRequestError(f"messages must be a conversation, or a list of them, got {messages!r:.80}")
    if not messages or not isinstance(messages[0], (list, tuple)):
        return [messages] if messages else []
    for index, conversation in enumerate(messages):
        if not isinstance(conversation, (list, tuple)):
            raise InvalidRequestError(f"conversation {index} must be a list of messages, got {conversation!r:.80}")
    return list(messages)


def for_template(message: Any, *, parts: bool = False) -> dict[str, Any]:
    """A message as a template takes it: text in one piece, arguments of calls as mappings, nothing that is None.

    Args:
        message: a mapping, or an object with `model_dump`, such as an answer of the openai package. So may be its tool
            calls and the parts of its content. Keys that OpenAI's messages don't have are handed on.
        parts: the template wants the content as a list of parts.

    Raises:
        InvalidRequestError: it has no role, content that is no text, or tool calls that are none.
    """
    given = _plain(message)
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"a message must be a mapping with a role and content, got {given!r}")
    found = {name: value for name, value in given.items() if value is not None and name not in _NOT_FOR_TEMPLATES}
    role = found.get("role")
    if not isinstance(role, str):
        raise InvalidRequestError(f"a message needs a role, a text such as 'user', got {role!r}")
    found["role"] = ROLES.get(role, role)
    text = _content_of(given)
    found["content"] = [{"type": "text", "text": text}] if parts else text
    if calls := _calls_of(given):
        found["tool_calls"] = calls
    return found


def _plain(value: Any) -> Any:
    """An object of the openai package, or another pydantic model, as a mapping; other values as they are."""
    return value.model_dump() if hasattr(value, "model_dump") and not isinstance(value, type) else value


def _content_of(message: Mapping[str, Any]) -> str:
    """The text of a message, of a refusal, or of an answer that was spoken."""
    audio = _plain(message.get("audio"))
    spoken = audio.get("transcript") if isinstance(audio, Mapping) else None
    content = message.get("content")
    return text_of(next((value for value in (content, message.get("refusal"), spoken) if value is not None), None))


def _calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    old, calls = message.get("function_call"), message.get("tool_calls") or []
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Iterable) or hasattr(calls, "model_dump"):
        raise InvalidRequestError(f"a message's tool_calls must be a list of tool calls, got {calls!r}")
    return [_call(_plain(call)) for call in [*calls, *([{"function": old}] if old else [])]]


def text_of(content: Any) -> str:
    """The text of a message's content: one piece, or parts, each on a line of its own. None is an empty text.

    Raises:
        InvalidRequestError: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"a message's content must be a text or a list of parts, got {content!r}")
    return "\n".join(_text_of_part(part) for part in content)


def _text_of_part(given: Any) -> str:
    part = _plain(given)
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get(_TEXT_PARTS[kind]) if kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise InvalidRequestError(f"a message has a part of the type {kind!r}; only parts with text are carried")
    return text


def _call(call: Any) -> dict[str, Any]:
    function = _plain(call.get("function")) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"a tool call needs a function with a name, got {call!r}")
    arguments = function.get("arguments")
    own = {} if arguments is None else {"arguments": arguments_of(arguments)}
    rest = {name: value for name, value in call.items() if value is not None}
    return {"type": "function", **rest, "function": {"name": function["name"], **own}}


def arguments_of(given: Any) -> Any:
    """A call's arguments as templates want them: parsed, if they are JSON that a template can write."""
    if not isinstance(given, str):
        return given
    try:
        return strict_json.loads(given)
    except ValueError:
        return given
