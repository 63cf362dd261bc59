"""POST /v1/chat/completions."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.server import heavy
from hf_paged.server.bodies import BodyRoute
from hf_paged.server.errors import invalid
from hf_paged.server.generation import Call, Choice
from hf_paged.server.protocol.chat import ChatRequest, ChatResponse
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.routes.chat_parts import ChatParts
from hf_paged.server.routes.chat_prompt import forced, known_options, plain
from hf_paged.server.routes.respond import event, prompt_logprobs_json, respond
from hf_paged.server.sampling import Shape, needs_structured, sampling_params, shape_of
from hf_paged.server.text.logprobs import chat_logprobs
from hf_paged.server.text.stream import Piece

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=ERRORS, summary="Answer a conversation")
async def chat(body: ChatRequest, request: Request) -> Response:
    """OpenAI's chat completions, with vLLM's further fields. `stream` makes it server-sent events."""
    call = Call(request, body, "chatcmpl")
    answer = _Answer(call, body)
    return await respond(request, call, bool(body.stream), answer.events, answer.whole)


class _Answer:
    """What a call is answered with."""

    def __init__(self, call: Call, body: ChatRequest) -> None:
        self._call = call
        self._body = body
        self._parts: dict[int, ChatParts] = {}
        self._schema, self._named = forced(body.tools or [], body.tool_choice, body.parallel_tool_calls is not False)

    async def _start(self) -> None:
        body, call = self._body, self._call
        shape = shape_of(body.response_format, body.structured_outputs, call.ready)
        if self._schema is not None:
            if shape is not None:
                raise invalid("tool_choice and response_format both shape the answer; give one", "tool_choice")
            if not call.ready.structured:
                raise needs_structured("tool_choice")
            shape = Shape("tools", {"json": self._schema})
        call.check_room(body.n or 1)
        text = await self._prompt()
        ids = await call.ids(text, special=body.add_special_tokens, param="messages")
        wanted = {"max_completion_tokens": body.max_completion_tokens, "max_tokens": body.max_tokens}
        room = call.room(ids, "messages", **wanted)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        make = functools.partial(sampling_params, seeds=call.seeds, max_tokens=room, logprobs=logprobs, shape=shape)
        params = await heavy.run_if(call.has_long_lists, make, body, call.ready)
        await call.start([(ids, params)], shape)

    async def _prompt(self) -> str:
        body, call = self._body, self._call
        if body.chat_template and not call.config.trust_request_chat_template:
            raise invalid("chat_template of a call needs --trust-request-chat-template", "chat_template")
        options = dict(body.chat_template_kwargs or {})
        template = body.chat_template or call.model_text.chat_template
        options |= known_options(template, reasoning_effort=body.reasoning_effort, verbosity=body.verbosity)
        tools = (tool.model_dump(exclude_none=True) for tool in body.tools or [])
        return await call.model_text.render(
            map(plain, body.messages),
            tools=tools if body.tool_choice != "none" else None,
            documents=body.documents,
            chat_template=body.chat_template,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_options=options,
        )

    def _parts_of(self, choice: Choice) -> ChatParts:
        if choice.index not in self._parts:
            body = self._body
            names = [tool.function.name for tool in body.tools or []] if body.tool_choice != "none" else []
            self._parts[choice.index] = ChatParts(
                names,
                self._call.config.tool_parser,
                named=self._named,
                whole=self._schema is not None,
                parallel=body.parallel_tool_calls is not False,
            )
        return self._parts[choice.index]

    # ---------------------------------------------------------------------------------------------------------- answers

    async def whole(self) -> dict[str, Any]:
        """The answer as one body."""
        await self._start()
        found: dict[int, dict[str, Any]] = {}
        extra: dict[str, Any] = {}
        async for choice, piece in self._call.pieces():
            part = self._parts_of(choice).add(piece)
            one = found.setdefault(choice.index, self._empty(choice))
            one["message"]["content"] += part.text
            one["message"]["tool_calls"] += [call.body() for call in part.calls]
            one |= {"finish_reason": part.finish_reason, "stop_reason": piece.stop_reason}
            if one["logprobs"] is not None:
                one["logprobs"]["content"] += self._logprobs(piece)["content"]
            if self._body.return_token_ids:
                one["token_ids"] += piece.tokens
                extra["prompt_token_ids"] = list(choice.prompt)
            if self._body.prompt_logprobs is not None and piece.prompt_logprobs is not None:
                extra["prompt_logprobs"] = await prompt_logprobs_json(self._call.model_text, piece.prompt_logprobs)
        choices = [_tidy(found[index]) for index in sorted(found)]
        if self._body.metadata is not None:
            extra["metadata"] = self._body.metadata
        return self._body_of(choices, "chat.completion") | {"usage": self._call.usage().model_dump()} | extra

    def _empty(self, choice: Choice) -> dict[str, Any]:
        one: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": "", "refusal": None, "tool_calls": []},
            "logprobs": {"content": [], "refusal": None} if self._body.logprobs else None,
        }
        return one | ({"token_ids": []} if self._body.return_token_ids else {})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        await self._start()
        options = self._body.stream_options
        counted = bool(options and options.continuous_usage_stats)
        begun: set[int] = set()
        async for choice, piece in self._call.pieces():
            usage = {"usage": self._call.usage().model_dump()} if counted else {}
            if choice.index not in begun:
                begun.add(choice.index)
                yield event(await self._first(choice, piece) | usage)
            chunk = self._chunk(choice, piece)
            if chunk is not None:
                yield event(self._body_of([chunk], "chat.completion.chunk") | usage)
        if options and options.include_usage:
            yield event(self._body_of([], "chat.completion.chunk") | {"usage": self._call.usage().model_dump()})

    async def _first(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        one = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        found = self._body_of([one], "chat.completion.chunk")
        if self._body.return_token_ids:
            found["prompt_token_ids"] = list(choice.prompt)
        if self._body.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            found["prompt_logprobs"] = await prompt_logprobs_json(self._call.model_text, piece.prompt_logprobs)
        return found

    def _chunk(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        part = self._parts_of(choice).add(piece)
        delta: dict[str, Any] = {"content": part.text} if part.text else {}
        if part.deltas:
            delta["tool_calls"] = [new.body() for new in part.deltas]
        logprobs = self._logprobs(piece) if self._body.logprobs and piece.tokens else None
        if not (delta or part.finish_reason or logprobs or self._body.return_token_ids):
            return None
        one = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": part.finish_reason}
        if part.finish_reason:
            one["stop_reason"] = piece.stop_reason
        if self._body.return_token_ids:
            one["token_ids"] = list(piece.tokens)
        return one

    def _logprobs(self, piece: Piece) -> Any:
        return chat_logprobs(self._call.model_text.tokens, piece, self._body.top_logprobs or 0)

    def _body_of(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        call = self._call
        body = {"id": call.id, "object": kind, "created": call.created, "model": call.model, "choices": choices}
        return body | ({"service_tier": "default"} if self._body.service_tier else {})


def _tidy(one: dict[str, Any]) -> dict[str, Any]:
    """An answer without what it hasn't got: calls, or text beside calls."""
    message = one["message"]
    if not message["tool_calls"]:
        del message["tool_calls"]
    elif not message["content"].strip():
        message["content"] = None
    return one
