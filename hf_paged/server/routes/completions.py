"""POST /v1/completions."""

from __future__ import annotations

from collections import abc
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.params import SamplingParams
from hf_paged.server import heavy
from hf_paged.server.bodies import BodyRoute
from hf_paged.server.errors import check_vocabulary, invalid
from hf_paged.server.front.sequence import Sequence
from hf_paged.server.generation import FEW
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.protocol.completions import CompletionRequest, CompletionResponse
from hf_paged.server.routes.choices import ChoicesCall, Chunk, extend
from hf_paged.server.routes.respond import respond
from hf_paged.server.sampling import Shape, sampling_params, shape_of
from hf_paged.server.text.logprobs import CompletionLogprobs
from hf_paged.server.text.stream import Piece

router = APIRouter(route_class=BodyRoute, tags=["OpenAI"])
MOST_PROMPTS = 1024


@router.post("/v1/completions", response_model=CompletionResponse, responses=ERRORS, summary="Continue text")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """OpenAI's completions, with vLLM's further fields. `stream` makes it server-sent events."""
    return await respond(request, _CompletionCall(request, body))


class _CompletionCall(ChoicesCall):
    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")
    body: CompletionRequest

    def __init__(self, request: Request, body: CompletionRequest) -> None:
        super().__init__(request, body)
        self._texts: list[str] = []  # of the prompts
        self._logprobs: dict[int, CompletionLogprobs] = {}

    async def begin(self) -> None:
        body = self.body
        prompts = await self._prompts()
        asked = {"structured_outputs": body.structured_outputs, "response_format": body.response_format}
        shape = shape_of(self.ready, asked)
        large = len(prompts) > FEW or self.has_long_lists
        await self.start(await heavy.run_if(large, self._with_params, prompts, shape), shape)

    def _with_params(self, prompts: list[list[int]], shape: Shape | None) -> list[tuple[list[int], SamplingParams]]:
        body = self.body
        rooms = [self.room(ids, "prompt", max_tokens=body.max_tokens) for ids in prompts]
        params: list[tuple[list[int], SamplingParams]] = []
        for number, (ids, room) in enumerate(zip(prompts, rooms, strict=True)):
            one = sampling_params(
                body, self.ready, seeds=self.seeds, max_tokens=room, logprobs=body.logprobs, shape=shape
            )
            if body.echo and body.logprobs is not None and one.prompt_logprobs is None:
                one = one.replace(prompt_logprobs=body.logprobs)
            if body.seed is not None and number:  # prompts of one call draw differently
                one = one.replace(seed=body.seed + number * one.n)
            params.append((ids, one))
        return params

    async def _prompts(self) -> list[list[int]]:
        given, echo = self.body.prompt, self.body.echo
        items: abc.Sequence[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        if not items:
            raise invalid("the prompt is empty; give at least one token", "prompt")
        if len(items) > MOST_PROMPTS:
            raise invalid(f"{len(items)} prompts are more than the {MOST_PROMPTS} that a call may have", "prompt")
        self.check_room(len(items) * (self.body.n or 1))
        found = []
        for item in items:
            if isinstance(item, str):
                found.append(await self.ids(item, special=self.body.add_special_tokens, param="prompt"))
                self._texts.append(item)
            else:
                check_vocabulary(item, self.ready.vocab_size, "prompt")
                found.append(self.cut(item))
                if echo:
                    self.room(found[-1], "prompt", max_tokens=self.body.max_tokens)  # before all of it is decoded
                self._texts.append(await self.model_text.decode(item) if echo else "")
        return found

    async def choice_of(self, sequence: Sequence, piece: Piece, first: bool) -> dict[str, Any]:
        body = self.body
        echoed = self._texts[sequence.index // (body.n or 1)] if first and body.echo else ""
        logprobs = None
        if body.logprobs is not None:
            long = len(piece.prompt_logprobs or ()) > FEW
            logprobs = await heavy.run_if(long, self._logprobs_of, sequence, piece, echoed)
        return {
            "index": sequence.index,
            "text": echoed + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            **({"token_ids": list(piece.tokens)} if body.return_token_ids else {}),
            **await self.of_prompt(sequence, piece, first),
        }

    async def chunks_of(self, sequence: Sequence, piece: Piece, first: bool) -> list[Chunk]:
        one = await self.choice_of(sequence, piece, first)
        told = one["text"] or one["finish_reason"] or one["logprobs"] or one.get("token_ids")
        return [(one, {})] if told else []

    def _logprobs_of(self, sequence: Sequence, piece: Piece, echoed: str) -> dict[str, Any] | None:
        count = self.body.logprobs
        assert count is not None
        builder = self._logprobs.setdefault(sequence.index, CompletionLogprobs(self.model_text.tokens, count))
        found: dict[str, Any] = {}
        if self.body.echo and piece.prompt_logprobs is not None:
            found = builder.prompt(sequence.prompt, piece.prompt_logprobs, echoed)
        if piece.tokens:
            extend(found, builder.output(piece))
        return found or None
