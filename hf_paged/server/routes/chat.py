"""POST /v1/chat/completions."""

from __future__ import annotations

import collections
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.server.bodies import BodyRoute
from hf_paged.server.errors import invalid
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.protocol.chat import ChatRequest, ChatResponse
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.routes.choices import ChoicesCall, Chunk
from hf_paged.server.routes.prompts import known_options, plain
from hf_paged.server.routes.respond import respond
from hf_paged.server.routes.tool_use import ToolReader, ToolUse
from hf_paged.server.sampling import shape_of
from hf_paged.server.text.logprobs import chat_logprobs
from hf_paged.server.text.stream import Piece

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=ERRORS, summary="Answer a conversation")
async def chat(body: ChatRequest, request: Request) -> Response:
    """OpenAI's chat completions, with vLLM's further fields. `stream` makes it server-sent events."""
    return await respond(request, _ChatCall(request, body))


class _ChatCall(ChoicesCall):
    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")
    body: ChatRequest

    def __init__(self, request: Request, body: ChatRequest) -> None:
        super().__init__(request, body)
        self._tools = ToolUse(body.tools or [], body.tool_choice, body.parallel_tool_calls, self.config.tool_parser)
        self._readers = collections.defaultdict[int, ToolReader](self._tools.reader)
        if body.metadata is not None:
            self._beside["metadata"] = body.metadata

    async def begin(self) -> None:
        body = self.body
        asked = {"tool_choice": self._tools, "structured_outputs": body.structured_outputs}
        shape = shape_of(self.ready, {**asked, "response_format": body.response_format})
        self.check_room(body.n or 1)
        await self.start_one(
            await self._prompt(),
            special=body.add_special_tokens,
            param="messages",
            shape=shape,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            max_completion_tokens=body.max_completion_tokens,
            max_tokens=body.max_tokens,
        )

    async def _prompt(self) -> str:
        body = self.body
        if body.chat_template and not self.config.trust_request_chat_template:
            raise invalid("chat_template of a call needs --trust-request-chat-template", "chat_template")
        options = dict(body.chat_template_kwargs or {})
        template = body.chat_template or self.model_text.chat_template
        options |= known_options(template, reasoning_effort=body.reasoning_effort, verbosity=body.verbosity)
        return await self.model_text.render(
            plain(body.messages),
            tools=plain(body.tools) if body.tool_choice != "none" else None,
            documents=body.documents,
            chat_template=body.chat_template,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_options=options,
        )

    async def choice_of(self, sequence: Sequence, piece: Piece, first: bool) -> dict[str, Any]:
        self._readers[sequence.index].read(piece)
        self._beside |= await self.of_prompt(sequence, piece, first)
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None} if first else {}
        message |= {"content": piece.text, "tool_calls": [call.body() for call in piece.calls]}
        return {"index": sequence.index, "message": message, **self._rest(piece), "stop_reason": piece.stop_reason}

    def answer(self) -> dict[str, Any]:
        for choice in self._choices.values():  # leave out empty calls, and blank text beside calls
            message = choice["message"]
            if not message["tool_calls"]:
                del message["tool_calls"]
            elif not message["content"].strip():
                message["content"] = None
        return super().answer()

    async def chunks_of(self, sequence: Sequence, piece: Piece, first: bool) -> list[Chunk]:
        chunks: list[Chunk] = []
        if first:
            begun = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            chunks.append(({"index": sequence.index, **begun}, await self.of_prompt(sequence, piece, first)))
        self._readers[sequence.index].read(piece)
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.deltas:
            delta["tool_calls"] = [new.body() for new in piece.deltas]
        rest = self._rest(piece)
        if not piece.tokens:
            rest["logprobs"] = None
        if delta or piece.finish_reason or rest["logprobs"] or self.body.return_token_ids:
            stop = {"stop_reason": piece.stop_reason} if piece.finish_reason else {}
            chunks.append(({"index": sequence.index, "delta": delta, **rest, **stop}, {}))
        return chunks

    def _rest(self, piece: Piece) -> dict[str, Any]:
        """What a choice and a chunk's choice have alike."""
        count = self.body.top_logprobs or 0
        logprobs = chat_logprobs(self.model_text.tokens, piece, count) if self.body.logprobs else None
        ids = {"token_ids": list(piece.tokens)} if self.body.return_token_ids else {}
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason, **ids}

    def body_of(self, kind: str, choices: list[dict[str, Any]], counted: bool) -> dict[str, Any]:
        tier = {"service_tier": "default"} if self.body.service_tier else {}
        return super().body_of(kind, choices, counted) | tier
