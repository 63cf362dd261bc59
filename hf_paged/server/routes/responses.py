"""POST /v1/responses, stateless."""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.params import SamplingParams
from hf_paged.server import heavy
from hf_paged.server.bodies import BodyRoute
from hf_paged.server.errors import invalid
from hf_paged.server.generation import Call
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.protocol.responses import ResponseBody, ResponsesRequest
from hf_paged.server.routes.chat_parts import ChatParts
from hf_paged.server.routes.chat_prompt import forced
from hf_paged.server.routes.respond import event, respond
from hf_paged.server.routes.responses_prompt import prompt_of
from hf_paged.server.sampling import Shape, needs_structured, sampling_params
from hf_paged.server.text.logprobs import chat_logprobs
from hf_paged.server.text.stream import Piece
from hf_paged.server.text.tools import ParsedCall

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])
# Fields of a call that its answer repeats as they are.
_REPEATED = ("max_tool_calls", "prompt_cache_key", "safety_identifier", "top_logprobs", "user")


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
        text = await prompt_of(body, self._tools, call.model_text)
        ids = await call.ids(text, special=False, param="input")
        shape = self._shape()
        make = functools.partial(
            sampling_params,
            seeds=call.seeds,
            max_tokens=call.room(ids, "input", max_output_tokens=body.max_output_tokens),
            logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
            shape=shape,
        )
        self._params = await heavy.run_if(call.has_long_lists, make, body, call.ready)
        await call.start([(ids, self._params)], shape)

    def _shape(self) -> Shape | None:
        form = self._body.text.format if self._body.text else None
        found: Shape | None = None
        if form is not None and form.type == "json_object":
            found = Shape("text.format", {"json_object": True})
        elif form is not None and form.type == "json_schema":
            found = Shape("text.format", {"json": form.schema_ or {}})
        if self._schema is not None:
            if found is not None:
                raise invalid("tool_choice and text.format both shape the answer; give one", "tool_choice")
            found = Shape("tools", {"json": self._schema})
        if found is not None and not self._call.ready.structured:
            raise needs_structured("text.format" if self._schema is None else "tool_choice")
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
                for one in self._message_ends("completed"):
                    yield one
            for one in itertools.chain.from_iterable(self._call_events(entry) for entry in calls):
                yield one
        if not self._calls:
            begun_late = [] if self._text else self._message_begins()
            for one in [*begun_late, *self._message_ends(self._status)]:
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

    def _message_ends(self, status: str) -> list[bytes]:
        item = self._message(status)
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
        if not self._body.wants_logprobs:
            return []
        found: list[Any] = chat_logprobs(self._call.model_text.tokens, piece, self._body.top_logprobs or 0)["content"]
        return found

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
            said = self._message("completed" if self._calls else self._status)  # a message before calls is over
            output = [said] if self._text or not self._calls else []
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
            "tools": [tool.told() for tool in body.tools or []],
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "usage": self._usage() if complete else None,
            "background": False,
            "reasoning": body.reasoning.model_dump(exclude_none=True) if body.reasoning else None,
            "service_tier": "default" if body.service_tier else None,
            **{name: getattr(body, name) for name in _REPEATED},
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


def _call_item(entry: tuple[str, ParsedCall]) -> dict[str, Any]:
    item_id, call = entry
    item = {"id": item_id, "type": "function_call", "status": "completed", "call_id": call.id}
    return item | {"name": call.name, "arguments": call.arguments}


def _dumped(choice: Any) -> Any:
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()
