"""Connections: how many there may be, and how long a client may take to send, and to take what it is sent.

uvicorn counts connections, and over h11 the bytes of headers, and no more.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import json
import logging
import time
from collections import Counter, deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from hf_paged.server.errors import APIError
from hf_paged.server.middleware import REFUSED

HEADER_BYTES = 2**16  # of a call's headers; also of bytes in a row that are not part of a body
SLOWEST = 2**14  # bytes a second; a slower client is closed when its time is over
AHEAD = 16  # calls that a client may send before the one before them is answered
HURRY = 5.0  # seconds without progress that a drain allows
LINGER = 2.0  # seconds in which a refused client may take its answer
IGNORED_BYTES = 2**26  # limit on what a client sends after its answer

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
        self._open: dict[_Connection, str] = {}
        self._waiting: dict[_Connection, None] = {}  # for their clients, the longest first
        self._of_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: _Connection, address: str) -> None:
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

    def leave(self, connection: _Connection) -> None:
        """Count it no more."""
        self._waiting.pop(connection, None)
        address = self._open.pop(connection, None)
        if address is not None:
            self._of_address[address] -= 1
            if not self._of_address[address]:
                del self._of_address[address]

    def waits(self, connection: _Connection) -> None:
        """It waits for its client."""
        if connection in self._open:
            self._waiting[connection] = None

    def works(self, connection: _Connection) -> None:
        """It doesn't wait for its client."""
        self._waiting.pop(connection, None)

    def hurry(self) -> None:
        """Shorten the time for sending calls and taking answers to `HURRY`: the server is about to end."""
        self.patience = min(self.patience, HURRY)
        for connection in list(self._open):
            connection.hurry()


class _Connection(HttpToolsProtocol):
    """A connection within limits.

    What a client owes is timed by one timer, from the connection's or a call's first byte to the call's last. A call
    that comes whole in one piece, as nearly all do, costs none. One that becomes a WebSocket is not limited any more.
    """

    def __init__(self, register: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._register = register
        self._refusal: APIError | None = None
        self._upgraded = False
        self._receiving = False  # a call has begun, and not all of it has come
        self._has_headers = False  # all headers of that call have come
        self._barren = 0  # bytes received since the last byte of a body
        self._header_bytes = 0
        self._body_bytes = 0
        self._ignored = 0  # bytes that came after the answer to their call, and were thrown away
        self._owes: asyncio.TimerHandle | None = None
        self._owes_since = 0.0
        self._taking: asyncio.TimerHandle | None = None
        self._untaken = 0  # bytes that waited to be sent when `_taking` was set
        self._calls: deque[Any] = deque()  # uvicorn's cycles of those that are not answered
        self._closing: asyncio.TimerHandle | None = None  # set: it was refused

    # ------------------------------------------------------------------------------------------------- coming and going

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        try:
            self._register.enter(self, _address(self.client))
        except APIError as error:  # not counted, so close it
            transport.write(_answer(error, self.server_state.default_headers))
            transport.close()
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self.pipeline.clear()
        for cycle in self._calls:  # uvicorn only tells the last one
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self) -> None:
        self._upgraded = True
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
        if self._closing is not None:
            self._closing.cancel()

    def _refuse(self, error: APIError) -> None:
        """Answer with an error, where no other answer has begun, and close.

        What the client still sends is read and ignored for a while: closing before it is read would take the answer
        away from it.
        """
        if self._working or (self._receiving and self._has_headers and self.cycle.response_started):
            return self.drop(error.message)
        logger.info("connection refused", extra={"client": self.client and self.client[0], "why": error.message})
        self._expect_nothing()
        self._watch_taking(False)
        if self.cycle is not None:  # the application gets no more of this call, and its answer is not sent
            self.cycle.scope["state"][REFUSED] = error.status
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(_answer(error, self.server_state.default_headers))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._closing = self.loop.call_later(LINGER, self.transport.abort)
        self._register.waits(self)

    @property
    def _working(self) -> bool:
        """Whether a call has come whole and is not answered yet."""
        cycle = self.cycle
        return bool(self.pipeline) or (cycle is not None and not cycle.response_complete and not cycle.more_body)

    def _settle(self, owing: bool) -> None:
        """See what the connection waits for: the application, or its client, which may be `owing` a call."""
        if self._working:
            self._register.works(self)
        else:
            self._register.waits(self)
        if owing and not self._working:
            self._expect()
        else:
            self._expect_nothing()

    # ---------------------------------------------------------------------------------------------- what a client sends

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._closing is not None:
            return self._ignore(len(data))
        self._barren += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self._upgraded or self._closing is not None:
            return
        if self._barren > HEADER_BYTES:
            self._refuse(_too_long())
        else:
            self._settle(owing=True)

    def send_400_response(self, msg: str) -> None:
        """Answer to what uvicorn can't parse, and to what the methods below raise."""
        self._refuse(self._refusal or APIError(400, "this is no HTTP request", code="invalid_http"))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= AHEAD:
            self._stop(APIError(400, f"more than {AHEAD} calls were sent ahead of their answers", code="pipeline"))
        self._receiving, self._has_headers = True, False
        self._header_bytes = self._body_bytes = self._ignored = 0
        self._owes_since = time.monotonic()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Trailers come here too."""
        self._count_header(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_headers = True
        if not self.flow.write_paused:  # the client sends its next call, so it has read its answers
            self._watch_taking(False)
        super().on_headers_complete()
        if self.cycle is not None:
            self._calls.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._barren = 0
        if self.cycle.response_complete:
            self._ignore(len(body))
        else:
            self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._barren = 0
        self._receiving = False
        super().on_message_complete()

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES:
            self._stop(_too_long())

    def _stop(self, error: APIError) -> None:
        """End parsing with a refusal."""
        self._refusal = error
        raise error

    def _ignore(self, size: int) -> None:
        """Throw away bytes that came after the answer; too many of them end the connection."""
        self._ignored += size
        if self._ignored > IGNORED_BYTES:
            self.drop("it goes on sending after its answer")

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
        if self.flow.read_paused:
            self._owes_since, self._body_bytes = time.monotonic(), 0
        over = self._owes_since + self._register.patience + self._body_bytes / SLOWEST - time.monotonic()
        if over > 0:
            self._owes = self.loop.call_later(over, self._late)
            return
        self._owes = None
        message = f"a call has to be sent within {self._register.patience:g} s, and at {SLOWEST} bytes a second"
        self._refuse(APIError(408, message, code="request_timeout"))

    # ---------------------------------------------------------------------------------------------- what a client takes

    def on_response_complete(self) -> None:
        self._calls.popleft()
        super().on_response_complete()
        self._watch_taking(self.transport.get_write_buffer_size() > 0)
        if self.transport.is_closing():
            return
        if self._receiving:  # answered before the call's end: its rest gets a time limit of its own
            self._owes_since, self._body_bytes = time.monotonic(), 0
        self._register.works(self)  # restart its waiting time
        self._settle(owing=self._receiving)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_taking(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        ended = self.cycle is not None and self.cycle.response_complete
        self._watch_taking(ended and self.transport.get_write_buffer_size() > 0)

    def hurry(self) -> None:
        """Begin the times that run again, with the register's shorter patience."""
        if self._taking is not None:
            self._watch_taking(True)
        if self._owes is not None:
            self._expect_nothing()
            self._expect()

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
    return functools.partial(_Connection, register)


def _address(client: tuple[str, int] | None) -> str:
    """What connections are counted by: an address, or a network of IPv6, of which one client has all addresses."""
    if client is None:
        return ""
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return client[0]
    if address.version == 6 and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
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
