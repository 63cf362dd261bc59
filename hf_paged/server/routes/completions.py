"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.params import SamplingParams
from hf_paged.server import heavy
from hf_paged.server.bodies import BodyRoute
from hf_paged.server.errors import invalid
from hf_paged.server.generation import FEW, Call, Choice
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.protocol.completions import CompletionRequest, CompletionResponse
from hf_paged.server.routes.respond import event, prompt_logprobs_json, respond
from hf_paged.server.sampling import Shape, sampling_params, shape_of
from hf_paged.server.text.logprobs import CompletionLogprobs
from hf_paged.server.text.stream import Piece

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])
MOST_PROMPTS = 1024


@router.post("/v1/completions", response_model=CompletionResponse, responses=ERRORS, summary="Continue text")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """OpenAI's completions, with vLLM's further fields. `stream` makes it server-sent events."""
    call = Call(request, body, "cmpl")
    answer = _Answer(call, body)
    return await respond(request, call, bool(body.stream), answer.events, answer.whole)


class _Answer:
    """What a call is answered with, choice by choice."""

    def __init__(self, call: Call, body: CompletionRequest) -> None:
        self._call = call
        self._body = body
        self._texts: list[str] = []
        self._logprobs: dict[int, CompletionLogprobs] = {}

    async def _start(self) -> None:
        body, call = self._body, self._call
        prompts = await self._prompts()
        shape = shape_of(body.response_format, body.structured_outputs, call.ready)
        large = len(prompts) > FEW or call.has_long_lists
        await call.start(await heavy.run_if(large, self._with_params, prompts, shape), shape)

    def _with_params(self, prompts: list[list[int]], shape: Shape | None) -> list[tuple[list[int], SamplingParams]]:
        body, call = self._body, self._call
        rooms = [call.room(ids, "prompt", max_tokens=body.max_tokens) for ids in prompts]
        params: list[tuple[list[int], SamplingParams]] = []
        for number, (ids, room) in enumerate(zip(prompts, rooms, strict=True)):
            one = sampling_params(
                body, call.ready, seeds=call.seeds, max_tokens=room, logprobs=body.logprobs, shape=shape
            )
            if body.echo and body.logprobs is not None and one.prompt_logprobs is None:
                one = one.replace(prompt_logprobs=body.logprobs)
            if body.seed is not None and number:  # prompts of one call draw differently
                one = one.replace(seed=body.seed + number * one.n)
            params.append((ids, one))
        return params

    async def _prompts(self) -> list[list[int]]:
        given, call = self._body.prompt, self._call
        items: Sequence[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        if not items:
            raise invalid("the prompt is empty; give at least one token", "prompt")
        if len(items) > MOST_PROMPTS:
            raise invalid(f"{len(items)} prompts are more than the {MOST_PROMPTS} that a call may have", "prompt")
        call.check_room(len(items) * (self._body.n or 1))
        found = []
        for item in items:
            if isinstance(item, str):
                found.append(await call.ids(item, special=self._body.add_special_tokens, param="prompt"))
                self._texts.append(item)
            else:
                found.append(call.cut(self._known(item)))
                if self._body.echo:
                    call.room(found[-1], "prompt", max_tokens=self._body.max_tokens)  # before all of it is decoded
                self._texts.append(await call.model_text.decode(item) if self._body.echo else "")
        return found

    def _known(self, ids: list[int]) -> list[int]:
        size = self._call.ready.vocab_size
        if ids and max(ids) >= size:
            wrong = next(token for token in ids if token >= size)
            raise invalid(f"token id {wrong} in the prompt is outside the vocabulary (0 to {size - 1})", "prompt")
        return ids

    # ---------------------------------------------------------------------------------------------------------- answers

    async def whole(self) -> dict[str, Any]:
        """The answer as one body."""
        await self._start()
        found: dict[int, dict[str, Any]] = {}
        async for choice, piece in self._call.pieces():
            part = await self._part(choice, piece, first=choice.index not in found)
            _extend(found.setdefault(choice.index, {}), part)
        choices = [found[index] for index in sorted(found)]
        return self._body_of(choices) | {"usage": self._call.usage().model_dump()}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        await self._start()
        options = self._body.stream_options
        counted = bool(options and options.continuous_usage_stats)
        begun: set[int] = set()
        async for choice, piece in self._call.pieces():
            part = await self._part(choice, piece, first=choice.index not in begun)
            begun.add(choice.index)
            if part["text"] or part["finish_reason"] or part["logprobs"] or part.get("token_ids"):
                usage = {"usage": self._call.usage().model_dump()} if counted else {}
                yield event(self._body_of([part]) | usage)
        if options and options.include_usage:
            yield event(self._body_of([]) | {"usage": self._call.usage().model_dump()})

    def _body_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        call = self._call
        return {
            "id": call.id,
            "object": "text_completion",
            "created": call.created,
            "model": call.model,
            "choices": choices,
        }

    async def _part(self, choice: Choice, piece: Piece, first: bool) -> dict[str, Any]:
        body, text = self._body, piece.text
        echoed = self._texts[choice.index // (body.n or 1)] if first and body.echo else ""
        logprobs = None
        if body.logprobs is not None:
            long = len(piece.prompt_logprobs or ()) > FEW
            logprobs = await heavy.run_if(long, self._logprobs_of, choice, piece, echoed)
        text = echoed + text
        part: dict[str, Any] = {"index": choice.index, "text": text, "logprobs": logprobs}
        part |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if body.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            part["prompt_logprobs"] = await prompt_logprobs_json(self._call.model_text, piece.prompt_logprobs)
        if body.return_token_ids:
            part["token_ids"] = list(piece.tokens)
            if first:
                part["prompt_token_ids"] = list(choice.prompt)
        return part

    def _logprobs_of(self, choice: Choice, piece: Piece, echoed: str) -> dict[str, Any] | None:
        count = self._body.logprobs
        assert count is not None
        builder = self._logprobs.setdefault(choice.index, CompletionLogprobs(self._call.model_text.tokens, count))
        found: dict[str, Any] = {}
        if self._body.echo and piece.prompt_logprobs is not None:
            found = builder.prompt(choice.prompt, piece.prompt_logprobs, echoed)
        if piece.tokens:
            _extend_logprobs(found, builder.output(piece))
        return found or None


def _extend(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part of a choice to what there is of it."""
    for name, value in part.items():
        before = whole.get(name)
        if before is None:
            whole[name] = value
        elif name == "logprobs" and value is not None:
            _extend_logprobs(before, value)
        elif name in ("text", "token_ids"):
            whole[name] = before + value
        elif value is not None:
            whole[name] = value


def _extend_logprobs(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, entries in part.items():
        whole[name] = whole.get(name, []) + entries
