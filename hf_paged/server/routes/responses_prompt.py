"""The input of a call of /v1/responses -> messages of a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_paged.server.errors import invalid
from hf_paged.server.protocol.responses import (
    InputCall,
    InputCallOutput,
    InputMessage,
    InputReasoning,
    InputText,
    ResponsesRequest,
)


def messages_of(body: ResponsesRequest) -> Iterator[dict[str, Any]]:
    """Instructions and input as messages, made where they are gone through.

    Raises:
        APIError: 400, the input is empty.
    """
    yield from _messages(body)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The messages. What the model thought goes to the answer that follows."""
    found = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    if not body.input:
        raise invalid("the input is empty", "input")
    thoughts: str | None = None
    for item in body.input:
        if isinstance(item, InputReasoning):
            thoughts = _text(item.content or item.summary or []) or thoughts
            continue
        _add(found, item)
        if thoughts and found[-1]["role"] == "assistant":
            before = found[-1].get("reasoning_content")
            found[-1]["reasoning_content"] = f"{before}\n{thoughts}" if before else thoughts
        thoughts = None
    return found


def _add(messages: list[dict[str, Any]], item: InputMessage | InputCall | InputCallOutput) -> None:
    """Add an input item to the messages; calls that follow one another are one message."""
    if isinstance(item, InputMessage):
        messages.append({"role": item.role, "content": _text(item.content)})
        return
    if isinstance(item, InputCallOutput):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        return
    name = f"{item.namespace}.{item.name}" if item.namespace else item.name
    function = {"name": name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
