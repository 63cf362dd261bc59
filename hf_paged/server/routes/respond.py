"""How a call is answered: as one body, or as server-sent events; and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from hf_paged.server import heavy
from hf_paged.server.errors import APIError, ClientGone
from hf_paged.server.generation import FEW, Call
from hf_paged.server.messages import TokenLogprobs
from hf_paged.server.text.logprobs import prompt_logprob
from hf_paged.server.text.model_text import ModelText

logger = logging.getLogger(__name__)

T = TypeVar("T")
to_json = msgspec.json.Encoder().encode


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + to_json(data) + b"\n\n"


def whole_json(body: dict[str, Any]) -> bytes:
    """An answer's body, its choices one by one: other threads run in between."""
    choices = body.get("choices", [])
    if len(choices) < 2:
        return to_json(body)
    return to_json(body | {"choices": _joined(choices)})


async def prompt_logprobs_json(text: ModelText, entries: Sequence[TokenLogprobs | None]) -> msgspec.Raw:
    """The `prompt_logprobs` of an answer, as JSON. Of a long prompt they are many: a thread writes them."""
    return await heavy.run_if(len(entries) > FEW, _prompt_logprobs, text, entries)


def _prompt_logprobs(text: ModelText, entries: Sequence[TokenLogprobs | None]) -> msgspec.Raw:
    return _joined([prompt_logprob(text.tokens, entry) for entry in entries])


def _joined(values: Sequence[Any]) -> msgspec.Raw:
    """A list's JSON, written member by member."""
    return msgspec.Raw(b"[" + b",".join(map(to_json, values)) + b"]")


async def respond(request: Request, call: Call) -> Response:
    """Answer a call, and close it when that is done.

    A stream begins with its first event, so that what fails before has a status of its own.
    """
    call.open()
    handed_on = False
    try:
        if not call.body.stream:
            found = await unless_gone(request.receive, call.whole())
            tokens = sum(sequence.text.num_tokens for sequence in call.sequences)
            many = len(call.sequences) > FEW or tokens > heavy.MANY
            return Response(await heavy.run_if(many, whole_json, found), media_type="application/json")
        source = call.events()
        try:
            first = await unless_gone(request.receive, anext(source))
        except BaseException:
            await source.aclose()
            raise
        handed_on = True
        return _EventStream(call, first, source)
    finally:
        if not handed_on:
            await call.close()


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientGone: it left.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for other in (task, leaving):
            other.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events. When the client leaves, or the source fails, the call is closed.

    Args:
        call: closed at the end, however that comes.
        first: the first event.
        source: the others.
    """

    def __init__(self, call: Call, first: bytes, source: AsyncGenerator[bytes, None]) -> None:
        self.status_code, self.background = 200, None
        self.media_type = "text/event-stream"
        self.charset = "utf-8"
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._call, self._first, self._source = call, first, source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._pump(send))
        except ClientGone:
            pass
        except Exception as error:
            logger.debug("a stream broke off: %r", error)
        finally:
            with contextlib.suppress(RuntimeError):
                await self._source.aclose()
            await self._call.close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _send(send, self._first)
        try:
            async for data in self._source:
                await _send(send, data)
            end = self._call.done
        except APIError as error:
            end = event(error.body) + self._call.done
        except OSError:
            raise
        except Exception:
            logger.exception("a stream failed", extra={"request_id": self._call.client_id})
            end = event(APIError(500, "internal error; see the server's logs").body) + self._call.done
        await send({"type": "http.response.body", "body": end, "more_body": False})


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
