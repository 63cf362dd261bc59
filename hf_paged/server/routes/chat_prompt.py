"""A chat call's messages and tools, as chat templates want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_paged.server.protocol.chat import Message, NamedTool, Tool

# What of a message a template sees.
_SHOWN = {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content"}


def plain(message: Message) -> dict[str, Any]:
    """A message as `ModelText.render` takes it."""
    return message.model_dump(include=_SHOWN, exclude_none=True)


def known_options(template: str | None, **wanted: str | None) -> dict[str, str]:
    """Those of the options that are given and that the template knows; the others could not change its text.

    Args:
        template: the chat template; None: the tokenizer chooses it, and may know all of them.
        wanted: the options, None where one isn't given.
    """
    return {
        name: value for name, value in wanted.items() if value is not None and (template is None or name in template)
    }


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
