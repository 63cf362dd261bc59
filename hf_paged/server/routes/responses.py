"""POST /v1/responses, stateless."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.params import SamplingParams
from hf_paged.server.errors import invalid
from hf_paged.server.generation import Call
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.protocol.responses import (
    InputCall,
    InputCallOutput,
    InputMessage,
    InputText,
    ResponseBody,
    ResponsesRequest,
)
from hf_paged.server.routes.chat_parts import ChatParts
from hf_paged.server.routes.chat_prompt import ROLES, arguments_of, effort, forced
from hf_paged.server.routes.respond import event, respond
from hf_paged.server.sampling import needs_structured, sampling_params
from hf_paged.server.text.logprobs import chat_logprobs
from hf_paged.server.text.stream import Piece
from hf_paged.server.text.tools import ParsedCall

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", response_model=ResponseBody, responses=ERRORS, summary="Answer, statelessly")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """OpenAI's responses without storage: each call brings its whole conversation. `stream` makes it events."""
    call = Call(request, body, "resp")
    answer = _Answer(call, body)
    return await respond(request, call, bool(body.stream), answer.events, answer.whole, done=b"")


class _Answer:
    """What a call is answered with: at most one message, and the calls that the model made."""

    def __init__(self, call: Call, body: ResponsesRequest) -> None:
        self._call = call
        self._body = body
        self._tools = [tool.as_chat() for tool in body.tools or []]
        self._parallel = body.parallel_tool_calls is not False
        self._schema, named = forced(self._tools, body.chat_choice(), self._parallel)
        names = [tool.function.name for tool in self._tools] if body.tool_choice != "none" else []
        form, whole = call.config.tool_parser, self._schema is not None
        self._parts = ChatParts(names, form, named=named, whole=whole, parallel=self._parallel)
        self._params: SamplingParams | None = None
        self._text = ""
        self._logprobs: list[Any] = []
        self._calls: list[tuple[str, ParsedCall]] = []  # item id, call
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._finish: str | None = None
        self._numbers = itertools.count()

    async def _start(self) -> None:
        body, call = self._body, self._call
        text = await call.model_text.render(
            self._messages(),
            tools=[tool.model_dump(exclude_none=True) for tool in self._tools] if body.tool_choice != "none" else None,
            template_options=effort(
                body.reasoning.effort if body.reasoning else None, call.model_text.chat_template, "reasoning.effort"
            ),
        )
        ids = await call.ids(text, special=False, param="input")
        self._params = sampling_params(
            body,
            call.ready,
            max_tokens=call.room(ids, body.max_output_tokens, "input"),
            logprobs=(body.top_logprobs or 0) if body.include else None,
            structured=self._constraint(),
        )
        await call.start([(ids, self._params)])

    def _constraint(self) -> Mapping[str, Any] | None:
        form = self._body.text.format if self._body.text else None
        found: dict[str, Any] | None = None
        if form is not None and form.type == "json_object":
            found = {"json_object": True}
        elif form is not None and form.type == "json_schema":
            found = {"json": form.schema_ or {}}
        if self._schema is not None:
            if found is not None:
                raise invalid("tool_choice and text.format both shape the answer; give one", "tool_choice")
            found = {"json": self._schema}
        if found is not None and not self._call.ready.structured:
            raise needs_structured("text.format" if self._schema is None else "tool_choice")
        return found

    def _messages(self) -> list[dict[str, Any]]:
        body = self._body
        found = [{"role": "system", "content": body.instructions}] if body.instructions else []
        if isinstance(body.input, str):
            return [*found, {"role": "user", "content": body.input}]
        if not body.input:
            raise invalid("the input is empty", "input")
        for item in body.input:
            _add(found, item)
        return found

    # ---------------------------------------------------------------------------------------------------------- answers

    async def whole(self) -> dict[str, Any]:
        """The answer as one body."""
        await self._start()
        async for _, piece in self._call.pieces():
            self._take(piece)
        return self._response(complete=True)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        await self._start()
        begun = False
        async for _, piece in self._call.pieces():
            if not begun:
                begun = True
                for name in ("response.created", "response.in_progress"):
                    yield self._event(name, response=self._response(complete=False))
            had_text = bool(self._text)
            text, calls = self._take(piece)
            if text and not had_text:
                for one in self._message_begins():
                    yield one
            if text:
                place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
                entries = self._entries(piece)
                yield self._event("response.output_text.delta", **place, delta=text, logprobs=entries)
            if calls and self._text and len(self._calls) == len(calls):
                for one in self._message_ends():
                    yield one
            for one in itertools.chain.from_iterable(self._call_events(entry) for entry in calls):
                yield one
        if self._text and not self._calls:
            for one in self._message_ends():
                yield one
        name = "response.completed" if self._status == "completed" else "response.incomplete"
        yield self._event(name, response=self._response(complete=True))

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)

    def _message_begins(self) -> list[bytes]:
        item = {"id": self._message_id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **place, part=part),
        ]

    def _message_ends(self) -> list[bytes]:
        item = self._message("completed")
        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        return [
            self._event("response.output_text.done", **place, text=self._text, logprobs=self._logprobs),
            self._event("response.content_part.done", **place, part=item["content"][0]),
            self._event("response.output_item.done", output_index=0, item=item),
        ]

    def _call_events(self, entry: tuple[str, ParsedCall]) -> list[bytes]:
        item_id, call = entry
        index = self._calls.index(entry) + bool(self._text)
        place = {"item_id": item_id, "output_index": index}
        item = _call_item(entry)
        begun = item | {"status": "in_progress", "arguments": ""}
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=call.arguments),
            self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _take(self, piece: Piece) -> tuple[str, list[tuple[str, ParsedCall]]]:
        part = self._parts.add(piece)
        calls = [(f"fc_{uuid.uuid4().hex}", call) for call in part.calls]
        text = part.text if self._text or part.text.strip() or not calls else ""
        self._text += text
        self._calls += calls
        self._logprobs += self._entries(piece)
        self._finish = part.finish_reason or self._finish
        return text, calls

    def _entries(self, piece: Piece) -> list[Any]:
        if not self._body.include:
            return []
        count = self._body.top_logprobs or 0
        return chat_logprobs(self._call.model_text, piece.tokens, piece.logprobs or [], count)["content"]

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _message(self, status: str) -> dict[str, Any]:
        part = {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._logprobs}
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [part],
        }

    def _response(self, *, complete: bool) -> dict[str, Any]:
        call, body, params = self._call, self._body, self._params
        assert params is not None
        output: list[dict[str, Any]] = []
        if complete:
            output = [self._message(self._status)] if self._text or not self._calls else []
            output += [_call_item(entry) for entry in self._calls]
        status = self._status if complete else "in_progress"
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": call.id,
            "object": "response",
            "created_at": call.created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": call.model,
            "output": output,
            "parallel_tool_calls": self._parallel,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "text": body.text.model_dump(by_alias=True, exclude_none=True)
            if body.text
            else {"format": {"type": "text"}},
            "tool_choice": _dumped(body.tool_choice) or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "usage": self._usage() if complete else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._call.usage()
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }


def _add(messages: list[dict[str, Any]], item: InputMessage | InputCall | InputCallOutput) -> None:
    """Add an input item to the messages; calls that follow one another are one message."""
    if isinstance(item, InputMessage):
        messages.append({"role": ROLES.get(item.role, item.role), "content": _text(item.content)})
        return
    if isinstance(item, InputCallOutput):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        return
    function = {"name": item.name, "arguments": arguments_of(item.arguments)}
    call = {"id": item.call_id, "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _call_item(entry: tuple[str, ParsedCall]) -> dict[str, Any]:
    item_id, call = entry
    item = {"id": item_id, "type": "function_call", "status": "completed", "call_id": call.id}
    return item | {"name": call.name, "arguments": call.arguments}


def _dumped(choice: Any) -> Any:
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()
