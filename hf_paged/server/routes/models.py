"""GET /v1/models, and of one."""

from __future__ import annotations

from fastapi import APIRouter, Request

from hf_paged.server.errors import check_model
from hf_paged.server.protocol.common import ERRORS, ModelCard, ModelList

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", responses={401: ERRORS[401]}, summary="The models that are served")
async def models(request: Request) -> ModelList:
    """The model, under each of its names."""
    return ModelList(data=[_card(request, name) for name in request.app.state.config.names])


@router.get("/v1/models/{name:path}", responses={401: ERRORS[401], 404: ERRORS[404]}, summary="One model")
async def model(name: str, request: Request) -> ModelCard:
    """The model of that name."""
    check_model(name, request.app.state.config.names)
    return _card(request, name)


def _card(request: Request, name: str) -> ModelCard:
    state = request.app.state
    info = state.engine.info
    return ModelCard(
        id=name,
        created=int(state.lifecycle.started),
        root=state.config.model,
        max_model_len=None if info is None else info.longest,
    )
