"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from hf_paged.server.errors import APIError, invalid
from hf_paged.server.protocol.common import ERRORS
from hf_paged.server.protocol.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from hf_paged.server.routes.chat_prompt import plain
from hf_paged.server.text.model_text import ModelText

router = APIRouter(tags=["tokens"])
_ERRORS: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 401, 404, 413)}


@router.post("/tokenize", responses=_ERRORS, summary="Text or a conversation to ids")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
    """The ids that a prompt, or a conversation under the chat template, becomes."""
    text: ModelText = request.app.state.text
    _check_model(request, body.model)
    if body.prompt is not None:
        prompt, special = body.prompt, body.add_special_tokens is not False
    else:
        prompt = await text.render(
            [plain(message) for message in body.messages or []],
            tools=[tool.model_dump(exclude_none=True) for tool in body.tools or []],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_options=body.chat_template_kwargs,
        )
        special = bool(body.add_special_tokens)
    ids = await text.encode(prompt, special=special, most=None, param="prompt")
    info = request.app.state.engine.info
    return TokenizeResponse(
        count=len(ids),
        max_model_len=None if info is None else info.longest,
        tokens=ids,
        token_strs=[text.token(token) for token in ids] if body.return_token_strs else None,
    )


@router.post("/detokenize", responses=_ERRORS, summary="Ids to text")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
    """The text of ids, special tokens included."""
    text: ModelText = request.app.state.text
    _check_model(request, body.model)
    size = len(text.tokenizer)
    wrong = next((token for token in body.tokens if token >= size), None)
    if wrong is not None:
        raise invalid(f"token id {wrong} is outside the vocabulary (0 to {size - 1})", "tokens")
    return DetokenizeResponse(prompt=await text.decode(body.tokens))


def _check_model(request: Request, name: str | None) -> None:
    names = request.app.state.config.names
    if name is not None and name not in names:
        message = f"the model {name!r} is not served; served are {', '.join(names)}"
        raise APIError(404, message, param="model", code="model_not_found")
