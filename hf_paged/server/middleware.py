"""What surrounds every route, a plugin's too: request ids and logs, API keys, the limit on bodies."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_paged.server.errors import APIError

logger = logging.getLogger("hf_paged.server.access")

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
PROBES = frozenset({"/health", "/ready"})  # what an orchestrator asks, without a key
REFUSED = "refused"  # in the state of a call that its connection answered: the status that the client got
_ID = re.compile(r"[\x21-\x7e]{1,128}")


async def send_error(error: APIError, send: Send, **more: str) -> None:
    """Answer with an error body; `more` are headers."""
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers, **more}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class RequestIds:
    """Gives each call an id: the client's X-Request-Id where it sent a sane one. Echoes it, logs it, catches the rest.

    Routes find it in `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp, log: bool = True) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = 0, time.monotonic()

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except Exception:
            logger.exception("unexpected error", extra={"request_id": request_id})
            if status:  # half an answer is out; the server closes the connection
                raise
            await send_error(APIError(500, f"internal error; the logs have it under request id {request_id}"), tell)
        finally:
            if self._log and not is_probe(scope):
                status = scope["state"].get(REFUSED, status)
                fields = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
                who = {"client": (scope.get("client") or [None])[0], "api_key": scope["state"].get("api_key")}
                logger.info("request", extra=fields | {"seconds": round(time.monotonic() - began, 4)} | who)


class Hosts:
    """Refuses calls under a name that isn't the server's, but for the probes.

    A page of another site can have its own name point to this machine (DNS rebinding), and then read what a server
    without keys answers: the browser takes both for one site. The Host header still says that name.

    Args:
        names: the server's, without ports.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        host = Headers(scope=scope).get("host") if scope["type"] in ("http", "websocket") else None
        if host is None or is_probe(scope) or _name_of(host) in self._names:
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        message = (
            f"the host {host[:100]!r} is none of this server's names; start it with --allowed-hosts, or with a key"
        )
        await send_error(APIError(403, message, code="host_not_allowed"), send)


def is_probe(scope: Scope) -> bool:
    """Whether a call is an orchestrator's probe, below the root path too."""
    return scope["path"].removeprefix(scope.get("root_path", "")) in PROBES


def _name_of(host: str) -> str:
    """The name in a Host header, without port and without the brackets of IPv6."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:]*)(?::\d+)?", host.lower())
    return found[1].strip("[]") if found else ""


class APIKeys:
    """Asks for one of the keys, as `Authorization: Bearer KEY`, on every route but the probes.

    Routes find the number of the key, from 1 and as text, in `request.state.api_key`; the logs have it too.

    A browser can't send that for a page that somebody opens; so a page is asked for by Basic authentication, which
    browsers have a window for: any user name, and the key as the password.

    All keys are compared, each in constant time, so that how long it takes tells nothing.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket") or is_probe(scope) or self._knows(scope):
            return await self._app(scope, receive, send)
        error = APIError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            page = "text/html" in Headers(scope=scope).get("accept", "")
            await send_error(error, send, **{"WWW-Authenticate": 'Basic realm="hf_paged"' if page else "Bearer"})

    def _knows(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Browsers also send stored Basic credentials with requests that another site's page makes: don't accept those.
        if scheme.lower() == "basic" and headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            scheme, key = "bearer", _password(key)
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(found) or scheme.lower() != "bearer":
            return False
        scope.setdefault("state", {})["api_key"] = str(found.index(True) + 1)
        return True


def _password(credentials: str) -> str:
    """The password in Basic credentials, or an empty one where they are none."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


class BodyLimit:
    """Refuses bodies that are larger than a limit, before they are read in full."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._most):
            return await send_error(self._error(), send)
        taken, refused = 0, False

        async def measured() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return {"type": "http.disconnect"} if taken > self._most else message

        async def noted(message: Message) -> None:
            """Whatever the application makes of half a body, the client is told of the limit."""
            nonlocal refused
            if taken <= self._most:
                await send(message)
            elif not refused:
                refused = True
                await send_error(self._error(), send)

        await self._app(scope, measured, noted)

    def _error(self) -> APIError:
        return APIError(413, f"the body is larger than {self._most} bytes, the server's limit", code="body_too_large")
