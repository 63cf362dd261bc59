"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hf_paged.server import heavy
from hf_paged.server.bodies import BodyRoute
from hf_paged.server.errors import check_model, check_vocabulary, invalid
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.protocol.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from hf_paged.server.routes.prompts import plain
from hf_paged.server.routes.respond import to_json, unless_gone
from hf_paged.server.text.model_text import MOST_TOKENS, ModelText

router = APIRouter(route_class=BodyRoute, tags=["tokens"])
_ERRORS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 401, 404, 413, 429)}


@router.post("/tokenize", response_model=TokenizeResponse, responses=_ERRORS, summary="Text or a conversation to ids")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The ids that a prompt, or a conversation under the chat template, becomes."""
    check_model(body.model, request.app.state.config.names)
    return Response(await unless_gone(request.receive, _ids_of(body, request)), media_type="application/json")


@router.post("/detokenize", response_model=DetokenizeResponse, responses=_ERRORS, summary="Ids to text")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of ids, special tokens included."""
    text: ModelText = request.app.state.text
    check_model(body.model, request.app.state.config.names)
    most = _most(request)
    if len(body.tokens) > most:
        raise invalid(f"{len(body.tokens)} tokens are more than the {most} that a call may have", "tokens")
    check_vocabulary(body.tokens, len(text.tokenizer), "tokens")
    return Response(await unless_gone(request.receive, _text_of(body, text)), media_type="application/json")


async def _ids_of(body: TokenizeRequest, request: Request) -> bytes:
    text: ModelText = request.app.state.text
    if body.prompt is not None:
        prompt, special = body.prompt, body.add_special_tokens is not False
    else:
        prompt = await text.render(
            plain(body.messages),
            tools=plain(body.tools),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_options=body.chat_template_kwargs,
        )
        special = bool(body.add_special_tokens)
    param = "messages" if body.prompt is None else "prompt"
    ids = await text.encode(prompt, special=special, most=_most(request), param=param, context=False)
    info = request.app.state.engine.info
    longest = None if info is None else info.longest

    def build() -> bytes:
        names = [text.tokens.name(token) for token in ids] if body.return_token_strs else None
        return to_json({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": names})

    return await heavy.run_if(len(ids) > heavy.MANY, build)


async def _text_of(body: DetokenizeRequest, text: ModelText) -> bytes:
    return to_json({"prompt": await text.decode(body.tokens)})


def _most(request: Request) -> int:
    """Tokens that a text may have: more than the model takes, for who wants to know how many there are."""
    info = request.app.state.engine.info
    return max(MOST_TOKENS, 0 if info is None else info.longest)
