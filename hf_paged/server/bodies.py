"""Bodies: JSON is checked before a route sees it, and large ones are read in threads."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Coroutine
from email.message import Message as Headings
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_paged import strict_json
from hf_paged.server import heavy
from hf_paged.server.errors import APIError, invalid
from hf_paged.server.middleware import send_error
from hf_paged.server.stats import ServerStats
from hf_paged.server.validation import from_validation

_READ = "hf_paged.body"  # of an ASGI scope: the body as it was read
NAMED = 8  # keys of a path that an error message shows


@dataclasses.dataclass(frozen=True)
class Read:
    """A body's value, and how many bytes it was."""

    value: Any
    size: int


class JSONBodies:
    """Answers 400 to a body that is no JSON, or that holds what can't be carried on; see `strict_json.loads`.

    It stands before every route, a plugin's too. Bodies of other content types are left to their routes.
    """

    def __init__(self, app: ASGIApp, stats: ServerStats) -> None:
        self._app = app
        self._stats = stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not _is_json(Headers(scope=scope).get("content-type", "")):
            return await self._app(scope, receive, send)
        messages: list[Message] = []
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        try:
            scope[_READ] = await heavy.run_if(len(body) > heavy.LARGE, read, body)
        except APIError as error:
            if messages[-1]["type"] == "http.request":  # else the client left before the end of its body
                self._stats.refused("invalid")
                return await send_error(error, send)
        held = iter(messages)

        async def replay() -> Message:
            return next(held, None) or await receive()

        await self._app(scope, replay, send)


class BodyRoute(APIRoute):
    """A route that takes its body as `JSONBodies` read it. A large one is validated in a thread too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handler, model = super().get_route_handler(), _model_of(self.endpoint)

        async def handle(request: Request) -> Response:
            found: Read | None = request.scope.get(_READ)
            if found is not None and model is not None:
                value = found.value
                if found.size > heavy.LARGE:
                    try:
                        value = await heavy.run(_validated, model, value)
                    except APIError:
                        request.app.state.stats.refused("invalid")
                        raise
                # `Request.json` returns it. FastAPI doesn't validate an instance of the model again.
                request._json = value
            return await handler(request)

        return handle


def read(body: bytes) -> Read | None:
    """Read a body of JSON that can be carried on. An empty one is left to the route: None.

    Raises:
        APIError: 400; it names the field, where there is one.
    """
    if not body.strip():
        return None
    try:
        # Invalid UTF-8 is decoded to surrogates, so that strict_json can name the field that holds it.
        return Read(strict_json.loads(body.decode("utf-8-sig", "surrogateescape")), len(body))
    except json.JSONDecodeError as error:
        raise invalid(f"the body is not JSON: {error}") from error
    except strict_json.StrictJSONError as error:
        raise invalid(*_named(error)) from error


def _model_of(endpoint: Callable[..., Any]) -> type[BaseModel] | None:
    """The model of an endpoint's body."""
    hints = typing.get_type_hints(endpoint)
    hints.pop("return", None)
    return next((kind for kind in hints.values() if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


def _validated(model: type[BaseModel], value: Any) -> BaseModel:
    try:
        return model.model_validate(value, from_attributes=True)  # as FastAPI does
    except ValidationError as error:
        problems = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise from_validation(problems, value) from error


def _named(error: strict_json.StrictJSONError) -> tuple[str, str | None]:
    """The message, and the field that it names."""
    keys = [str(key).encode("utf-8", "backslashreplace").decode()[:64] for key in error.path[:NAMED]]
    if not keys:
        return error.problem, None
    field = ".".join(keys)
    return f"{field}{'…' if len(error.path) > NAMED else ''}: {error.problem}", field


def _is_json(content_type: str) -> bool:
    """Whether a route takes a body of this type for JSON; without a type some releases of FastAPI do."""
    headings = Headings()
    headings["content-type"] = content_type or "application/json"
    kind = headings.get_content_subtype()
    return headings.get_content_maintype() == "application" and (kind == "json" or kind.endswith("+json"))
