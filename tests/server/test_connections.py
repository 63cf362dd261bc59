"""Connections of slow, silent, greedy and many clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from hf_paged.errors import ConfigError
from hf_paged.server import connections
from hf_paged.server.config import ServerConfig
from hf_paged.server.connections import HEADER_BYTES, Connections, protocol
from hf_paged.server.middleware import RequestIds

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
LONG = 30.0  # seconds after which a test that waits for the server fails


class Server:
    """An application behind limited connections, in this process."""

    def __init__(self, **limits: Any) -> None:
        self.limits = {"most": 100, "most_of_address": 100, "patience": 60.0} | limits
        self.left: list[str] = []  # what became of calls
        self.sent = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Takes a body; `/large` answers more than any buffer takes, `/wait` when told to, `/early` before the body."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            await self.sent.wait()
            return await send({"type": "websocket.send", "text": "x"})
        if scope["path"] == "/early":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            return await send({"type": "http.response.body", "body": b""})
        size = 0
        while (message := await receive())["type"] == "http.request":
            size += len(message["body"])
            if not message["more_body"]:
                break
        else:
            self.left.append("disconnected")
            return
        if scope["path"] == "/wait":
            await self.sent.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-size", str(size).encode())]})
        try:
            for _ in range(1000 if scope["path"] == "/large" else 1):
                await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.left.append("answered")


@contextlib.asynccontextmanager
async def running(around: Any = lambda app: app, **limits: Any) -> AsyncIterator[tuple[Server, Connections, int]]:
    app = Server(**limits)
    register = Connections(**app.limits)
    config = uvicorn.Config(around(app), http=protocol(register), log_config=None, lifespan="off")
    config.load()
    state = ServerState()
    made = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
        "127.0.0.1",
        0,
    )
    try:
        yield app, register, made.sockets[0].getsockname()[1]
    finally:
        made.close()
        for connection in list(state.connections):
            connection.transport.abort()


async def until(true: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not true():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), LONG)


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def opened(port: int) -> Streams:
    return await asyncio.open_connection("127.0.0.1", port, limit=2**20)


async def answer(streams: Streams) -> tuple[int, dict[str, str], bytes]:
    """Status, headers, and what follows until the server closes; or, where a length is said, as much."""
    head = await asyncio.wait_for(streams[0].readuntil(b"\r\n\r\n"), LONG)
    first, *lines = head.decode().strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if "content-length" in headers:
        body = await streams[0].readexactly(int(headers["content-length"]))
    else:
        body = await asyncio.wait_for(streams[0].readuntil(b"0\r\n\r\n"), LONG)
    return int(first.split()[1]), headers, body


async def closed(streams: Streams) -> None:
    with contextlib.suppress(ConnectionError):
        assert not await asyncio.wait_for(streams[0].read(), LONG)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 4 * LONG))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", GET + b"X-Y: z", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf"]
)
def test_a_call_that_is_not_sent_in_time_ends_with_408(sent: bytes) -> None:
    async def test() -> None:
        async with running(patience=0.2) as (app, register, port):
            client = await opened(port)
            client[1].write(sent)
            status, headers, body = await answer(client)
            assert (status, headers["connection"]) == (408, "close")
            assert json.loads(body)["error"]["code"] == "request_timeout"
            client[1].close()
            await until(lambda: not len(register))
            assert not register._of_address
            assert app.left == (["disconnected"] if b"half" in sent else [])

    run(test)


def test_the_log_has_the_status_that_the_client_got(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running(RequestIds, patience=0.2) as (_, register, port):
            client = await opened(port)
            client[1].write(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf")
            assert (await answer(client))[0] == 408
            client[1].close()
            await until(lambda: not len(register))

    with caplog.at_level("INFO", "hf_paged.server.access"):
        run(test)
    assert [record.status for record in caplog.records if record.name == "hf_paged.server.access"] == [408]


def test_a_connection_that_is_kept_alive_is_not_kept_by_empty_lines() -> None:
    async def test() -> None:
        async with running(patience=0.2) as (_, register, port):
            client = await opened(port)
            client[1].write(GET + b"\r\n")
            assert (await answer(client))[0] == 200
            await asyncio.sleep(0.5)  # nothing is owed between calls
            assert len(register) == 1
            with contextlib.suppress(ConnectionError):
                while len(register):
                    client[1].write(b"\r\n")
                    await asyncio.sleep(0.02)

    run(test)


def test_a_body_may_take_as_long_as_its_pace_is_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SLOWEST", 10)

    async def test() -> None:
        async with running(patience=0.2) as (_, _register, port):
            client = await opened(port)
            client[1].write(b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\n")
            for _ in range(10):  # it begins with 0.2 s, and gains one with each piece
                client[1].write(b"x" * 10)
                await asyncio.sleep(0.1)
            status, headers, _ = await answer(client)
            assert (status, headers["x-size"]) == (200, "100")

    run(test)


@pytest.mark.parametrize(
    "pieces",
    [
        [GET + b"X: " + b"y" * HEADER_BYTES + b"\r\n\r\n"],
        [b"GET /" + b"y" * HEADER_BYTES + b" HTTP/1.1\r\n\r\n"],
        [GET] + [b"X: y\r\n" * 1000] * 40,
        [GET + b"X: "] + [b"y" * 2**14] * 40,
        [b"GET /" + b"y" * 2**14] + [b"y" * 2**14] * 40,
        [b"\r\n" * 2**13] * 40,
        [b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"] + [b"X: y\r\n" * 1000] * 40,
        [b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: "] + [b"y" * 2**14] * 40,
        [b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;"] + [b"y" * 2**14] * 40,
    ],
    ids=[
        "header",
        "whole path",
        "headers",
        "endless header",
        "path",
        "empty lines",
        "trailers",
        "endless trailer",
        "extension",
    ],
)
def test_what_is_no_body_has_a_length(pieces: list[bytes]) -> None:
    async def test() -> None:
        async with running() as (app, register, port):
            client = await opened(port)
            for piece in pieces:
                client[1].write(piece)
                await client[1].drain()
                await asyncio.sleep(0)
            assert (await answer(client))[0] == 431
            client[1].close()
            await until(lambda: not len(register))
            assert app.left in ([], ["disconnected"])

    run(test)


def test_other_protocols_are_refused() -> None:
    async def test() -> None:
        async with running() as (_, _register, port):
            client = await opened(port)
            client[1].write(b"\x16\x03\x01\x02\x00\x01")
            status, _, body = await answer(client)
            assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")

    run(test)


def test_calls_sent_ahead_are_counted() -> None:
    async def test() -> None:
        async with running() as (app, register, port):
            client = await opened(port)
            calls = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
            client[1].write(calls * (connections.AHEAD + 1))
            await until(lambda: len(register) == 1)
            app.sent.set()
            for _ in range(connections.AHEAD + 1):
                assert (await answer(client))[0] == 200
            app.sent.clear()
            client[1].write(calls * (connections.AHEAD + 10))
            await closed(client)
            app.sent.set()

    run(test)


def test_the_connection_that_waits_longest_makes_room() -> None:
    async def test() -> None:
        async with running(most=3) as (app, register, port):
            working = await opened(port)
            working[1].write(b"GET /wait HTTP/1.1\r\n\r\n")
            await until(lambda: len(register) == 1 and not register._waiting)
            slow = [await opened(port) for _ in range(2)]
            await until(lambda: len(register) == 3)
            last = await opened(port)
            await closed(slow[0])
            last[1].write(GET + b"\r\n")
            assert (await answer(last))[0] == 200
            slow[1][1].write(b"GET /wait HTTP/1.1\r\n\r\n")
            last[1].write(b"GET /wait HTTP/1.1\r\n\r\n")
            await until(lambda: not register._waiting)
            refused = await opened(port)
            status, headers, body = await answer(refused)
            assert (status, headers["retry-after"]) == (503, "1")
            assert "3 connections are open" in json.loads(body)["error"]["message"]
            app.sent.set()
            for client in (working, slow[1], last):
                assert (await answer(client))[0] == 200

    run(test)


def test_a_call_that_follows_at_once_is_not_taken_for_an_idle_connection() -> None:
    async def test() -> None:
        async with running(most=1) as (app, register, port):
            client = await opened(port)
            client[1].write(GET + b"\r\n" + b"GET /wait HTTP/1.1\r\n\r\n")
            assert (await answer(client))[0] == 200
            await until(lambda: not register._waiting)
            assert (await answer(await opened(port)))[0] == 503
            app.sent.set()
            assert (await answer(client))[0] == 200

    run(test)


def test_each_call_of_a_row_has_its_own_time() -> None:
    """Even if none of the pieces that come ends where a call does."""

    async def test() -> None:
        async with running(patience=0.5) as (_, register, port):
            client = await opened(port)
            call = GET + b"\r\n"
            client[1].write(call[:5])
            (connection,) = [c async for c in one_of(register)]
            began = connection._owes_since
            client[1].write(call[5:] + call[:5])
            assert (await answer(client))[0] == 200
            await until(lambda: connection._owes_since > began)
            client[1].write(call[5:])
            assert (await answer(client))[0] == 200

    run(test)


async def one_of(register: Connections) -> AsyncIterator[connections._Connection]:
    await until(lambda: len(register) == 1)
    yield next(iter(register._open))


@pytest.mark.parametrize("sent", [b"", b"x" * 8])
def test_the_rest_of_a_body_that_is_answered_early_has_its_time(sent: bytes) -> None:
    """Whether it is never sent, or goes on for ever."""

    async def test() -> None:
        async with running(patience=0.3) as (_, register, port):
            client = await opened(port)
            client[1].write(b"POST /early HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\nhalf")
            assert (await answer(client))[0] == 200
            with contextlib.suppress(ConnectionError):
                while len(register):
                    client[1].write(sent)
                    await asyncio.sleep(0.02)

    run(test)


def test_a_client_that_never_ends_its_body_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IGNORED_BYTES", 10**6)

    async def test() -> None:
        async with running() as (_, register, port):
            client = await opened(port)
            client[1].write(b"POST /early HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\nhalf")
            assert (await answer(client))[0] == 200
            with contextlib.suppress(ConnectionError):
                while len(register):
                    client[1].write(b"x" * 10**5)
                    await client[1].drain()

    run(test)


def test_a_websocket_is_not_timed() -> None:
    """wsproto and websockets speak on the connection once it is one."""

    async def test() -> None:
        async with running(patience=0.1) as (app, register, port):
            client = await opened(port)
            client[1].write(
                b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            head = await asyncio.wait_for(client[0].readuntil(b"\r\n\r\n"), LONG)
            assert head.startswith(b"HTTP/1.1 101 ")
            assert len(register) == 0
            await asyncio.sleep(0.3)
            app.sent.set()
            assert (await asyncio.wait_for(client[0].read(100), LONG))[:1] == b"\x81"  # a frame of text

    pytest.importorskip("wsproto")
    run(test)


def test_an_address_has_its_share() -> None:
    async def test() -> None:
        async with running(most_of_address=2) as (_, register, port):
            first, _second = await opened(port), await opened(port)
            await until(lambda: len(register) == 2)
            status, _, body = await answer(await opened(port))
            assert status == 503
            assert "2 connections are open from 127.0.0.1" in json.loads(body)["error"]["message"]
            first[1].close()
            await until(lambda: len(register) == 1)
            third = await opened(port)
            third[1].write(GET + b"\r\n")
            assert (await answer(third))[0] == 200

    run(test)


@pytest.mark.parametrize("hurried", [False, True])
def test_an_answer_that_is_not_taken_ends_the_connection(monkeypatch: pytest.MonkeyPatch, hurried: bool) -> None:
    """After the time that a client has, or the short one that a drain leaves."""
    monkeypatch.setattr(connections, "HURRY", 0.2)

    async def test() -> None:
        async with running(patience=60.0 if hurried else 0.2) as (app, register, port):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await asyncio.to_thread(client.connect, ("127.0.0.1", port))
                client.sendall(b"GET /large HTTP/1.1\r\n\r\n")
                await until(lambda: any(c._taking for c in register._open))
                if hurried:
                    register.hurry()
                await until(lambda: not len(register) and app.left == ["answered"])

    run(test)


@pytest.mark.parametrize(
    ("left", "dropped"), [([100, 100], True), ([10**6, 10**6 - 100], True), ([10**6, 10**4], False), ([100, 0], False)]
)
def test_who_takes_an_answer_too_slowly(left: list[int], dropped: bool) -> None:
    """Bytes that wait when the client is looked at, and a patience later."""

    async def test() -> None:
        async with running() as (app, register, port):
            client = await opened(port)
            client[1].write(b"GET /wait HTTP/1.1\r\n\r\n")
            await until(lambda: len(register) == 1)
            (connection,) = register._open
            sizes = iter(left + [0] * 9)
            connection.transport = Clogged(connection.transport, lambda: next(sizes))  # type: ignore[assignment]
            connection._watch_taking(True)
            connection._check_taking()
            await until(lambda: (len(register) == 0) == dropped)
            app.sent.set()

    run(test)


def test_the_end_of_an_answer_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fits the connection's buffer, so that nothing pauses; the connection would be kept for good."""

    async def test() -> None:
        async with running(patience=0.2) as (app, register, port):
            with socket.socket() as client:
                await asyncio.to_thread(client.connect, ("127.0.0.1", port))
                await until(lambda: len(register) == 1)
                (connection,) = register._open
                monkeypatch.setattr(connection, "transport", Clogged(connection.transport, lambda: 100))
                client.sendall(GET + b"\r\n")
                await until(lambda: not len(register))
                assert app.left == ["answered"]

    run(test)


class Clogged:
    """A transport that says of itself how much waits to be sent."""

    def __init__(self, transport: asyncio.Transport, size: Callable[[], int]) -> None:
        self._transport, self.get_write_buffer_size = transport, size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.mark.parametrize(
    ("client", "counted"),
    [
        (None, ""),
        (("10.1.2.3", 1), "10.1.2.3"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 1), "fe80::/64"),
        (("::ffff:10.1.2.3", 1), "10.1.2.3"),
        (("a socket", 1), "a socket"),
    ],
)
def test_addresses(client: tuple[str, int] | None, counted: str) -> None:
    assert connections._address(client) == counted


@pytest.mark.parametrize("name", ["max_connections", "max_connections_per_address", "client_timeout"])
def test_options_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be"):
        ServerConfig(model="m", **{name: 0})
