"""ServerConfig: the options of a server, validated when built and never changed after."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from typing import Any

from hf_paged.config import PagedConfig
from hf_paged.errors import ConfigError
from hf_paged.params import MAX_LOGPROBS

LOOPBACK = "127.0.0.1"
_KEY = re.compile(r"[\x21-\x7e]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of `hf-paged serve`.

    Attributes:
        model: name or directory.
        served_model_names: what clients call it; the model's own name if empty.
        tokenizer, revision, trust_remote_code, dtype, device: for loading it.
        load_format: "auto", or "dummy" for random weights in the shape that its config gives.
        chat_template: a template, or the path of a file with one; None: the tokenizer's.
        trust_request_chat_template: let calls bring a template of their own.
        gpu_memory_utilization: share of a GPU's memory for weights and KV pool together.
        seed: of the seeds that requests without one are given, so that the same calls, one after the other, have the
            same answers; None: from the operating system.
        paged: options of the engines.
        replicas: engine processes.
        host, port, root_path: where it listens, and below which path it is seen.
        ssl_keyfile, ssl_certfile: TLS, where both are given.
        api_keys: where any is given, one of them is needed on every route but the probes. With several, the prompts of
            each key have a prefix cache of their own, so that none can tell what another has sent.
        allow_no_key: listen to other machines without a key.
        allowed_hosts: names by which a server without keys may be called, beside those of this machine; "*": any. A
            page of another site could otherwise reach it under a name of its own (DNS rebinding).
        cors_origins: origins that browsers may call from; none by default.
        max_body_bytes: of a request.
        max_connections: open ones. For a further one, the one that has waited longest for its client is closed.
        max_connections_per_address: of them, from one address (for IPv6: one /64 network). Behind a proxy, all clients
            count as one address.
        client_timeout: seconds that a client may take to send a call (and one more for each 16 KiB of its body), and
            that it may leave an answer untaken.
        max_queue_requests, max_queue_tokens: what may wait for its first token; more is refused with 429.
        max_logprobs: most likely tokens that a call may have reported for each token, at most 20; -1: the whole
            vocabulary too (`prompt_logprobs=-1`), a hundred megabytes for a few dozen tokens.
        default_timeout: seconds that a call may take, where it names no `timeout`; None: no limit.
        max_queue_seconds: how long a request may wait until it is handed to an engine; None: no limit.
        drain_timeout: seconds that running requests have after SIGTERM.
        spare_engine: keep a process at hand that has imported everything, for a restart to take less time.
        startup_timeout: seconds that an engine has to become ready; it is killed then, and another one follows.
        watchdog: seconds without a step, though there is work, after which an engine hangs.
        tool_parser: how tool calls are found in text: auto, hermes, json, or none.
        log_requests: log a line for each request. log_level, log_format: of the logs; "json" or "text".
        host_memory_share: of a CPU's free memory, the share that each replica's KV pool takes, where nothing sizes it.

    Raises:
        ConfigError: a value is out of range; the message names it and what is allowed.
    """

    model: str
    served_model_names: tuple[str, ...] = ()
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    load_format: str = "auto"
    device: str | None = None
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    gpu_memory_utilization: float = 0.92
    seed: int | None = None
    paged: PagedConfig = dataclasses.field(default_factory=PagedConfig)
    replicas: int = 1
    host: str = LOOPBACK
    port: int = 8000
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    allow_no_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    max_connections: int = 4096
    max_connections_per_address: int = 2048
    client_timeout: float = 30.0
    max_queue_requests: int = 1024
    max_queue_tokens: int = 4_000_000
    max_logprobs: int = MAX_LOGPROBS
    default_timeout: float | None = None
    max_queue_seconds: float | None = None
    drain_timeout: float = 30.0
    spare_engine: bool = True
    startup_timeout: float = 1800.0
    watchdog: float = 60.0
    tool_parser: str = "auto"
    log_requests: bool = True
    log_level: str = "info"
    log_format: str = "text"
    host_memory_share: float = 0.2

    def __post_init__(self) -> None:
        for name in COUNTS:
            _require(name, getattr(self, name), _is_int(getattr(self, name), 1), "an integer of at least 1")
        ok = _is_int(self.max_logprobs, -1) and self.max_logprobs <= MAX_LOGPROBS
        _require("max_logprobs", self.max_logprobs, ok, f"from 0 to {MAX_LOGPROBS}, or -1 for all")
        _require("port", self.port, _is_int(self.port, 0) and self.port < 65536, "from 0 (any free one) to 65535")
        for name in ("default_timeout", "max_queue_seconds", "client_timeout", "startup_timeout", "watchdog"):
            value = getattr(self, name)
            allowed = value is None if name in ("default_timeout", "max_queue_seconds") else False
            _require(name, value, allowed or (_is_number(value) and value > 0), "seconds above 0")
        ok = _is_number(self.drain_timeout) and self.drain_timeout >= 0
        _require("drain_timeout", self.drain_timeout, ok, "seconds, at least 0")
        _require("log_format", self.log_format, self.log_format in ("text", "json"), "text or json")
        _require("log_level", self.log_level, self.log_level in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("TLS needs both ssl_keyfile and ssl_certfile; one is missing")
        self._check_keys()
        known = ", ".join(LOAD_FORMATS)
        _require("load_format", self.load_format, self.load_format in LOAD_FORMATS, f"one of {known}")
        _require("tool_parser", self.tool_parser, self.tool_parser in TOOL_PARSERS, f"one of {', '.join(TOOL_PARSERS)}")

    def _check_keys(self) -> None:
        if any(not key for key in self.api_keys):
            raise ConfigError("an API key is empty; leave it out")
        if not all(_KEY.fullmatch(key) for key in self.api_keys):  # clients encode other characters differently
            raise ConfigError("an API key holds other characters than printable ASCII without spaces")
        if not (self.api_keys or self.allow_no_key or self.is_loopback):
            raise ConfigError(
                f"host={self.host!r} lets other machines in, and there is no API key; give one (--api-key, "
                "--api-key-file), or say --allow-no-key"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a host name, not an address

    @property
    def names(self) -> tuple[str, ...]:
        """The names that clients may call the model by; answers bear the first."""
        return self.served_model_names or (self.model,)


COUNTS = (
    "replicas",
    "max_body_bytes",
    "max_connections",
    "max_connections_per_address",
    "max_queue_requests",
    "max_queue_tokens",
)
LOG_LEVELS = ("debug", "info", "warning", "error")
LOAD_FORMATS = ("auto", "dummy")
TOOL_PARSERS = ("auto", "hermes", "json", "none")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(name: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {allowed}, got {value!r}")
