"""create_app: the FastAPI application over an engine."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

import pluggy
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hf_paged import plugins
from hf_paged._version import __version__
from hf_paged.server.bodies import JSONBodies
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import CLIENT_GONE, APIError, ClientGone
from hf_paged.server.front.fleet import Fleet
from hf_paged.server.lifecycle import Lifecycle
from hf_paged.server.logs import RequestLog
from hf_paged.server.middleware import LOCAL_NAMES, PROBES, APIKeys, BodyLimit, Hosts, RequestIds
from hf_paged.server.routes import ROUTERS
from hf_paged.server.stats import ServerStats
from hf_paged.server.validation import from_validation

if TYPE_CHECKING:
    from hf_paged.server.text.model_text import ModelText

STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
logger = logging.getLogger(__name__)


def create_app(
    config: ServerConfig,
    engine: Fleet,
    text: ModelText,
    stats: ServerStats,
    manager: pluggy.PluginManager | None = None,
) -> FastAPI:
    """The application, with the plugins' routes.

    Args:
        config: the server's options.
        engine: what carries the requests.
        text: tokenizer and templates.
        stats: what the engine's front tells.
        manager: the plugins; None: those that `config.paged` loads.

    Raises:
        PluginError: a plugin can't be loaded, or raised in `register_routes`.
    """
    app = FastAPI(
        title="hf_paged",
        version=__version__,
        root_path=config.root_path,
        description="OpenAI's API over hf_paged.",
        docs_url=None,  # FastAPI's pages load their scripts from another host; see `routes.docs`
        redoc_url=None,
    )
    app.state.config, app.state.engine, app.state.text, app.state.stats = config, engine, text, stats
    app.state.seeds = random.SystemRandom() if config.seed is None else random.Random(config.seed)
    app.state.lifecycle = Lifecycle()
    if config.log_requests:
        stats.subscribe(RequestLog())
    for router in ROUTERS:
        app.include_router(router)
    _add_error_bodies(app)
    _tell_the_truth(app, bool(config.api_keys))
    plugins.call(manager or plugins.load(config.paged), "register_routes", app=app, config=config)
    # The last one added is the outermost.
    app.add_middleware(JSONBodies, stats=stats)
    app.add_middleware(BodyLimit, most=config.max_body_bytes)
    if config.api_keys:
        app.add_middleware(APIKeys, keys=config.api_keys)
    elif (config.is_loopback or config.allowed_hosts) and "*" not in config.allowed_hosts:
        app.add_middleware(Hosts, names={*LOCAL_NAMES, config.host, *config.allowed_hosts})
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(RequestIds, log=config.log_requests)
    return app


def _add_error_bodies(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        request.app.state.stats.refused("invalid")
        return JSONResponse(from_validation(error.errors(), error.body).body, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        body = APIError(error.status_code, str(error.detail)).body
        return JSONResponse(body, error.status_code, error.headers)


def _tell_the_truth(app: FastAPI, keys: bool) -> None:
    """Have the OpenAPI schema say what this server does: 400 for what is malformed, events for streams, API keys."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if path in STREAMED:
                        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {}}
                    if keys and path not in PROBES:
                        operation["security"] = [{"key": []}]
            schemas = schema.get("components", {}).get("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            if keys:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
