"""POST /v1/responses, stateless."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.params import SamplingParams
from hf_paged.server.bodies import BodyRoute
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.generation import Call
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.protocol.responses import ResponseBody, ResponsesRequest
from hf_paged.server.routes.prompts import known_options, plain
from hf_paged.server.routes.respond import event, respond
from hf_paged.server.routes.responses_prompt import messages_of
from hf_paged.server.routes.tool_use import ToolUse
from hf_paged.server.sampling import shape_of
from hf_paged.server.text.logprobs import chat_logprobs
from hf_paged.server.text.stream import Piece
from hf_paged.server.text.tools import ParsedCall

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])
# Fields of a call that its answer repeats as they are.
_REPEATED = ("max_tool_calls", "prompt_cache_key", "safety_identifier", "top_logprobs", "user")

_PLAIN = {"format": {"type": "text"}}


@router.post("/v1/responses", response_model=ResponseBody, responses=ERRORS, summary="Answer, statelessly")
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """OpenAI's responses without storage: each call brings its whole conversation. `stream` makes it events."""
    return await respond(request, _ResponsesCall(request, body))


class _ResponsesCall(Call):
    """A call that is answered with at most one message, and the calls that the model made."""

    prefix = "resp"
    done = b""
    body: ResponsesRequest

    def __init__(self, request: Request, body: ResponsesRequest) -> None:
        super().__init__(request, body)
        self._tools = [tool.as_chat() for tool in body.tools or []]
        self._use = ToolUse(self._tools, body.chat_choice(), body.parallel_tool_calls, self.config.tool_parser)
        self._reader = self._use.reader()
        self._params: SamplingParams | None = None
        self._begun = False
        self._text = ""
        self._logprobs: list[Any] = []
        self._calls: list[tuple[str, ParsedCall]] = []  # item id, call
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._status = "completed"
        self._numbers = itertools.count()

    async def begin(self) -> None:
        body = self.body
        form = body.text.format if body.text else None
        text = await self.model_text.render(
            messages_of(body),
            tools=plain(self._tools) if body.tool_choice != "none" else None,
            template_options=known_options(
                self.model_text.chat_template,
                reasoning_effort=body.reasoning.effort if body.reasoning else None,
                verbosity=body.text.verbosity if body.text else None,
            ),
            param="input",
        )
        self._params = await self.start_one(
            text,
            special=False,
            param="input",
            shape=shape_of(self.ready, {"tool_choice": self._use, "text.format": form}),
            logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
            max_output_tokens=body.max_output_tokens,
        )

    async def take(self, sequence: Sequence, piece: Piece) -> None:
        self._take(piece)

    def answer(self) -> dict[str, Any]:
        return self._response(complete=True)

    async def events_of(self, sequence: Sequence, piece: Piece) -> list[bytes]:
        found: list[bytes] = []
        if not self._begun:
            self._begun = True
            names = ("response.created", "response.in_progress")
            found += [self._event(name, response=self._response(complete=False)) for name in names]
        had_text = bool(self._text)
        text, calls = self._take(piece)
        if text:
            found += [] if had_text else self._message_begins()
            entries = self._entries(piece)
            found.append(self._event("response.output_text.delta", **self._place, delta=text, logprobs=entries))
        if calls and self._text and len(self._calls) == len(calls):
            found += self._message_ends("completed")
        return [*found, *itertools.chain.from_iterable(self._call_events(entry) for entry in calls)]

    def last_events(self) -> list[bytes]:
        found: list[bytes] = []
        if not self._calls:
            found += [] if self._text else self._message_begins()
            found += self._message_ends(self._status)
        return [*found, self._event(f"response.{self._status}", response=self._response(complete=True))]

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)

    @property
    def _place(self) -> dict[str, Any]:
        """Of the message's text."""
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _message_begins(self) -> list[bytes]:
        item = self._message("in_progress") | {"content": []}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **self._place, part=part),
        ]

    def _message_ends(self, status: str) -> list[bytes]:
        item = self._message(status)
        return [
            self._event("response.output_text.done", **self._place, text=self._text, logprobs=self._logprobs),
            self._event("response.content_part.done", **self._place, part=item["content"][0]),
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
        """What a piece adds: text to show, and calls. White space alone before a call is no message."""
        self._reader.read(piece)
        calls = [(f"fc_{uuid.uuid4().hex}", call) for call in piece.calls]
        text = piece.text if self._text or piece.text.strip() or not calls else ""
        self._text += text
        self._calls += calls
        self._logprobs += self._entries(piece)
        if piece.finish_reason == "length":
            self._status = "incomplete"
        return text, calls

    def _entries(self, piece: Piece) -> list[Any]:
        if not self.body.wants_logprobs:
            return []
        found: list[Any] = chat_logprobs(self.model_text.tokens, piece, self.body.top_logprobs or 0)["content"]
        return found

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
        body, params = self.body, self._params
        assert params is not None
        output: list[dict[str, Any]] = []
        if complete:
            said = self._message("completed" if self._calls else self._status)  # calls follow: the message is complete
            output = [said] if self._text or not self._calls else []
            output += [_call_item(entry) for entry in self._calls]
        status = self._status if complete else "in_progress"
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": self._use.parallel,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "text": body.text.model_dump(by_alias=True, exclude_none=True) if body.text else _PLAIN,
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
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def _call_item(entry: tuple[str, ParsedCall]) -> dict[str, Any]:
    item_id, call = entry
    item = {"id": item_id, "type": "function_call", "status": "completed", "call_id": call.id}
    return item | {"name": call.name, "arguments": call.arguments}


def _dumped(choice: Any) -> Any:
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()
