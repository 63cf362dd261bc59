"""serve: engine processes, application and uvicorn, from the first log line to the exit status."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import sys
import time

import uvicorn
from fastapi import FastAPI

from hf_paged.errors import ConfigError, HFPagedError
from hf_paged.server import logs
from hf_paged.server.app import create_app
from hf_paged.server.config import ServerConfig
from hf_paged.server.connections import Connections, protocol
from hf_paged.server.errors import APIError
from hf_paged.server.front.fleet import Fleet
from hf_paged.server.lifecycle import Lifecycle, Phase
from hf_paged.server.stats import ServerStats
from hf_paged.server.text.model_text import ModelText

logger = logging.getLogger("hf_paged.server")

ABORTED = 130  # the exit status after a second signal
POLL = 0.02
SWITCH = 0.001  # seconds until a thread must release the GIL; Python's default is 0.005
DESCRIPTORS = 512  # reserved for everything but connections


def serve(config: ServerConfig) -> int:
    """Serve until a signal ends it; the exit status."""
    logs.configure(config.log_level, config.log_format)
    _check_tls(config)
    sys.setswitchinterval(SWITCH)
    loop = _new_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(_Server(config).run())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    """The loop of uvloop, where it is installed; it doesn't exist for Windows."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Server(uvicorn.Server):
    """uvicorn, with a life of our own: it listens before the model is loaded, and drains before it stops listening."""

    def __init__(self, config: ServerConfig) -> None:
        self.options = config
        self.stats = ServerStats()
        self.text = ModelText.load(config)
        self._connections = Connections(
            _possible(config.max_connections), config.max_connections_per_address, config.client_timeout
        )
        self._signals = 0
        self._failure: HFPagedError | None = None

    async def run(self) -> int:  # type: ignore[override]
        """Everything, in order."""
        options = self.options
        fleet = Fleet(options, self.stats)
        app = create_app(options, fleet, self.text, self.stats)
        super().__init__(_uvicorn_config(app, options, self._connections))
        life: Lifecycle = app.state.lifecycle
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, life)
        listening = _bind(options)
        if not (options.api_keys or options.is_loopback):
            logger.warning("no API key is set: every machine that reaches %s can call the server", options.host)
        host, port = listening.getsockname()[:2]
        logger.info("listening on %s port %s; loading %s", host, port, options.model)
        try:
            await life.run(life.on_start)
            fleet.start()
            starting = asyncio.create_task(self._become_ready(fleet, life))
            draining = asyncio.create_task(self._drain_when_told(life))
            await self.serve(sockets=[listening])
            life.phase = Phase.STOPPED
            for task in (starting, draining):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        finally:
            listening.close()
            await fleet.close()
            await life.run(life.on_stop)
            self.text.close()
            gc.unfreeze()  # frozen objects would be reported as leaks at exit
        if self._failure is not None:
            raise self._failure
        logger.info("stopped")
        return ABORTED if self._signals > 1 else 0

    def install_signal_handlers(self) -> None:
        """Ours are installed already."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Ours stay."""
        yield

    def _on_signal(self, life: Lifecycle) -> None:
        self._signals += 1
        if self._signals > 1:
            logger.warning("a second signal: what runs is aborted")
            self.force_exit = self.should_exit = True
        else:
            life.phase = Phase.DRAINING

    async def _become_ready(self, fleet: Fleet, life: Lifecycle) -> None:
        try:
            await fleet.wait_ready()
        except APIError as error:
            self._failure = ConfigError(error.message)
            self.should_exit = True
            return
        except Exception as error:
            logger.exception("the server can't tell whether its engines are ready")
            self._failure = HFPagedError(f"{type(error).__name__}: {error}")
            self.should_exit = True
            return
        gc.collect()
        gc.freeze()  # long-lived objects: exclude them from collection, for shorter pauses
        if life.phase is Phase.STARTING:
            life.phase = Phase.READY
            logger.info("ready after %.1f s", time.time() - life.started)

    async def _drain_when_told(self, life: Lifecycle) -> None:
        """After a signal: let what runs come to its end, as long as it may."""
        while life.phase is not Phase.DRAINING:
            await asyncio.sleep(POLL)
        try:
            until = time.monotonic() + self.options.drain_timeout
            logger.info("draining: %d calls in flight, at most %g s", life.in_flight, self.options.drain_timeout)
            self._connections.hurry()
            while life.in_flight and time.monotonic() < until and not self.should_exit:
                await asyncio.sleep(POLL)
            if life.in_flight:
                logger.warning("%d calls are aborted", life.in_flight)
                life.phase = Phase.STOPPED
                await self._abort_all()
        finally:
            self.should_exit = True

    async def _abort_all(self) -> None:
        """End what still runs with an error body rather than a broken connection."""
        app: FastAPI = self.config.app  # type: ignore[assignment]
        app.state.engine.abort_all()
        await asyncio.sleep(0.1)


def _uvicorn_config(app: FastAPI, options: ServerConfig, connections: Connections) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol(connections),
        log_config=None,
        access_log=False,
        lifespan="off",
        root_path=options.root_path,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
        server_header=False,
        backlog=4096,
    )


def _check_tls(options: ServerConfig) -> None:
    """See that certificate and key can be used, before anything is loaded.

    Raises:
        ConfigError: they can't; the message says why.
    """
    if options.ssl_certfile is None or options.ssl_keyfile is None:
        return

    def no_password() -> str:
        raise ConfigError(f"the TLS key {options.ssl_keyfile!r} has a password; give one without")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.ssl_certfile, options.ssl_keyfile, no_password)
    except OSError as error:  # ssl.SSLError is one
        files = f"{options.ssl_certfile!r} and {options.ssl_keyfile!r}"
        raise ConfigError(f"TLS can't use {files}: {error.strerror or error}") from error


def _possible(connections: int) -> int:
    """As many of these connections as the system has descriptors for; many shells allow 1,024, and more if asked."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return connections
    wanted = connections + DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        connections = max(1, hard - DESCRIPTORS)
        logger.warning("only %d connections are possible: the system allows %d descriptors", connections, hard)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return connections


def _bind(options: ServerConfig) -> socket.socket:
    """The listening socket.

    Raises:
        ConfigError: the address can't be had.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"can't listen on {options.host} port {options.port}: {error.strerror}") from error
    listening.listen(4096)
    listening.setblocking(False)
    return listening
