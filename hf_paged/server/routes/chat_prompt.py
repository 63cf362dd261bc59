"""A chat call's messages and tools, as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_paged.server.errors import invalid
from hf_paged.server.protocol.chat import Message, NamedTool, Tool

ROLES = {"developer": "system"}  # templates know the older name


def plain(message: Message) -> dict[str, Any]:
    """A message as a template takes it: text in one piece, arguments as mappings."""
    found: dict[str, Any] = {"role": ROLES.get(message.role, message.role), "content": _text(message)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments_of(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        return message.refusal or ""
    return "\n".join(part.text for part in message.content)


def arguments_of(text: str) -> Any:
    """A call's arguments as templates want them: parsed, if they are JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def effort(wanted: str | None, template: str | None, param: str) -> dict[str, str]:
    """The template's option for how much to think.

    Raises:
        APIError: 400, the template knows none.
    """
    if wanted is None:
        return {}
    if "reasoning_effort" not in (template or ""):
        raise invalid("the model's chat template knows no reasoning_effort; leave it out", param)
    return {"reasoning_effort": wanted}


def forced(
    tools: Sequence[Tool], choice: str | NamedTool | None, parallel: bool
) -> tuple[Mapping[str, Any] | None, str | None]:
    """The JSON schema that the answer has to have for a tool choice that forces a call, and the function it names."""
    if isinstance(choice, NamedTool):
        name = choice.function.name
        tool = next(tool for tool in tools if tool.function.name == name)
        return tool.function.parameters or {"type": "object"}, name
    if choice != "required":
        return None, None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool.function.name]},
                "parameters": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel else schema | {"maxItems": 1}, None
