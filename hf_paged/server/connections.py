"""Connections: how many there may be, and how long a client may take to send, and to take what it is sent.

uvicorn's protocol over httptools has no such limits. Its protocol over h11 limits headers, and nothing else, and takes
1.7 times as long for an event of a stream; Granian takes 1.3 times as long, hypercorn 2.3 times.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import json
import logging
import time
from collections import Counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from hf_paged.server.errors import APIError

HEADER_BYTES = 2**16  # of a call's headers; and of whatever comes in a row and is no part of a body
SLOWEST = 2**14  # bytes a second; a client that sends a body, or takes an answer, at this pace is left its time
AHEAD = 16  # calls that a client may send before the one before them is answered
HURRY = 5.0  # seconds without progress that a drain allows

logger = logging.getLogger("hf_paged.server.connections")


class Connections:
    """The open connections.

    Where there are too many, the one that has waited for its client for the longest is closed for a new one, so that
    slow clients can't keep others out.

    Args:
        most: connections.
        most_of_address: connections of one address; of one /64 network for IPv6.
        patience: seconds that a client may take to send a call, and one more for each `SLOWEST` bytes of its body; and
            to take what it is sent, at that pace at least.
    """

    def __init__(self, most: int, most_of_address: int, patience: float) -> None:
        self._most = most
        self._most_of_address = most_of_address
        self.patience = patience
        self._open: dict[Connection, str] = {}
        self._waiting: dict[Connection, None] = {}  # for their clients, the longest first
        self._of_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection, address: str) -> None:
        """Count a connection.

        Raises:
            APIError: 503, there are too many.
        """
        if self._of_address[address] >= self._most_of_address:
            raise _too_many(f"{self._most_of_address} connections are open from {address}, as many as may be")
        if len(self._open) >= self._most:
            longest = next(iter(self._waiting), None)
            if longest is None:
                raise _too_many(f"{self._most} connections are open, as many as may be, and all of them have calls")
            longest.drop("another one needs its place")
        self._open[connection] = address
        self._of_address[address] += 1
        self._waiting[connection] = None

    def leave(self, connection: Connection) -> None:
        """Count it no more."""
        self._waiting.pop(connection, None)
        address = self._open.pop(connection, None)
        if address is not None:
            self._of_address[address] -= 1
            if not self._of_address[address]:
                del self._of_address[address]

    def waits(self, connection: Connection, *, anew: bool = False) -> None:
        """It waits for its client; `anew`: since now."""
        if anew:
            self._waiting.pop(connection, None)
        if connection in self._open:
            self._waiting[connection] = None

    def works(self, connection: Connection) -> None:
        """It waits for its client no more."""
        self._waiting.pop(connection, None)

    def hurry(self) -> None:
        """Lose patience: the server is about to end."""
        self.patience = min(self.patience, HURRY)
        for connection in list(self._open):
            connection.hurry()


class Connection(HttpToolsProtocol):
    """A connection within limits.

    What a client owes is timed by one timer, from the connection's or a call's first byte to the call's last. A call
    that comes whole in one piece, as nearly all do, costs none. One that becomes a WebSocket is limited no more.
    """

    def __init__(self, register: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._register = register
        self._refusal: APIError | None = None
        self._receiving = False  # a call has begun, and not all of it has come
        self._barren = 0  # bytes since the last one of a body
        self._header_bytes = 0
        self._body_bytes = 0
        self._owes: asyncio.TimerHandle | None = None
        self._owes_since = 0.0
        self._taking: asyncio.TimerHandle | None = None
        self._untaken = 0  # bytes that waited to be sent when `_taking` was set

    # ------------------------------------------------------------------------------------------------- coming and going

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        try:
            self._register.enter(self, _address(self.client))
        except APIError as error:
            self._refuse(error)
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._leave()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        """See uvicorn."""
        self._leave()
        super().handle_websocket_upgrade()

    def drop(self, why: str) -> None:
        """Close it at once. What waits to be sent is lost, and a call is aborted."""
        logger.info("connection closed", extra={"client": self.client and self.client[0], "why": why})
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        self._register.leave(self)
        self._expect_nothing()
        self._watch_taking(False)

    def _refuse(self, error: APIError) -> None:
        """Answer with an error, where no other answer has begun, and close."""
        if not self._may_answer():
            return self.drop(error.message)
        logger.info("connection refused", extra={"client": self.client and self.client[0], "why": error.message})
        self._leave()
        if self.cycle is not None:
            self.cycle.disconnected = True  # whatever the application makes of half a call
        self.transport.write(_answer(error, self.server_state.default_headers))
        self.transport.close()
        self.loop.call_later(HURRY, self.transport.abort)  # if it isn't taken

    def _may_answer(self) -> bool:
        """Whether the client waits for an answer to what it is sending, or to nothing, rather than to a call before."""
        cycle = self.cycle
        if cycle is None or (cycle.response_complete and not cycle.more_body):
            return True
        return cycle.more_body and not cycle.response_started and not self.pipeline

    # ---------------------------------------------------------------------------------------------- what a client sends

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.transport.is_closing():
            return
        self._barren += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._barren > HEADER_BYTES:
            self._refuse(_too_long())
        elif self._receiving or self.cycle is None or self.cycle.response_complete:
            self._register.waits(self)
            self._expect()
        else:
            self._register.works(self)
            self._expect_nothing()

    def send_400_response(self, msg: str) -> None:
        """Answer to what uvicorn can't parse, and to what the methods below raise."""
        self._refuse(self._refusal or APIError(400, "this is no HTTP request", code="invalid_http"))

    def on_message_begin(self) -> None:
        """See httptools."""
        if len(self.pipeline) >= AHEAD:
            self._stop(APIError(400, f"more than {AHEAD} calls were sent ahead of their answers", code="pipeline"))
        self._receiving = True
        self._header_bytes = self._body_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Trailers come here too."""
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > HEADER_BYTES:
            self._stop(_too_long())
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._barren = 0
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._barren = 0
        self._receiving = False
        super().on_message_complete()

    def _stop(self, error: APIError) -> None:
        """End parsing with a refusal."""
        self._refusal = error
        raise error

    def _expect(self) -> None:
        if self._owes is None:
            self._owes_since = time.monotonic()
            self._owes = self.loop.call_later(self._register.patience, self._late)

    def _expect_nothing(self) -> None:
        if self._owes is not None:
            self._owes.cancel()
            self._owes = None

    def _late(self) -> None:
        """The time for a call is over, unless the server doesn't read it, or its body comes at a fair pace."""
        over = self._owes_since + self._register.patience + self._body_bytes / SLOWEST - time.monotonic()
        if self.flow.read_paused or over > 0:
            self._owes = self.loop.call_later(max(over, 1.0), self._late)
            return
        self._owes = None
        message = f"a call has to be sent within {self._register.patience:g} s, and at {SLOWEST} bytes a second"
        self._refuse(APIError(408, message, code="request_timeout"))

    # ---------------------------------------------------------------------------------------------- what a client takes

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        self._watch_taking(self.transport.get_write_buffer_size() > 0)
        if not self.transport.is_closing():
            self._register.waits(self, anew=True)

    def on_headers_complete(self) -> None:
        """See httptools."""
        if not self.flow.write_paused:  # a client that goes on is taken to have had its answers
            self._watch_taking(False)
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._watch_taking(True)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._watch_taking(False)

    def hurry(self) -> None:
        """See `Connections.hurry`."""
        if self._taking is not None:
            self._watch_taking(True)

    def _watch_taking(self, watch: bool) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None
        if watch:
            self._untaken = self.transport.get_write_buffer_size()
            self._taking = self.loop.call_later(self._register.patience, self._check_taking)

    def _check_taking(self) -> None:
        self._taking = None
        left = self.transport.get_write_buffer_size()
        if left and left > self._untaken - SLOWEST * self._register.patience:
            self.drop(f"{left} bytes of an answer weren't taken within {self._register.patience:g} s")
        elif left:
            self._watch_taking(True)


def protocol(register: Connections) -> Any:
    """What uvicorn makes its connections with."""
    return functools.partial(Connection, register)


def _address(client: tuple[str, int] | None) -> str:
    """What connections are counted by: an address, or a network of IPv6, of which one client has all addresses."""
    if client is None:
        return ""
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return client[0]
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _too_many(message: str) -> APIError:
    return APIError(503, message, code="too_many_connections", retry_after=1)


def _too_long() -> APIError:
    return APIError(431, f"the headers are longer than {HEADER_BYTES} bytes", code="headers_too_large")


def _answer(error: APIError, headers: list[tuple[bytes, bytes]]) -> bytes:
    """A whole HTTP response."""
    body = json.dumps(error.body).encode()
    own = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close", **error.headers}
    lines = [*headers, *((name.encode(), value.encode()) for name, value in own.items())]
    return STATUS_LINE[error.status] + b"".join(b"%s: %s\r\n" % line for line in lines) + b"\r\n" + body
