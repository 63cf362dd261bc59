"""`hf-paged serve` and `hf-paged chat`: their arguments. What they need is imported when they run."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from hf_paged.arguments import DTYPES, add_options, at_least_one, paged_options
from hf_paged.config import PagedConfig
from hf_paged.errors import ConfigError
from hf_paged.server.config import LOAD_FORMATS, LOG_LEVELS, LOOPBACK, TOOL_PARSERS, ServerConfig
from hf_paged.server.keys import KEY_VARIABLE, read_keys

_EXTRA = "needs the server's packages: pip install '.[server]' in a clone of hf_paged"


def add_serve_parser(subparsers: Any) -> None:
    """Add `hf-paged serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="Serve a model with OpenAI's protocol. The engine runs in a process of its own, is restarted when "
        "it dies, and its requests go on. SIGTERM drains; a second signal aborts.",
    )
    parser.add_argument("model", metavar="MODEL", help="name or directory")
    _add_model(parser)
    _add_listening(parser)
    _add_access(parser)
    _add_limits(parser)
    _add_life(parser)
    add_options(parser)
    parser.set_defaults(run=run_serve)


def add_chat_parser(subparsers: Any) -> None:
    """Add `hf-paged chat`."""
    parser = subparsers.add_parser(
        "chat", help="talk to a server", description="Talk to a running server of OpenAI's protocol in the terminal."
    )
    parser.add_argument("message", nargs="?", metavar="TEXT", help="say this and end (default: a conversation)")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server, without /v1 (default: %(default)s)"
    )
    parser.add_argument("--model", help="the name to ask for (default: the first that the server lists)")
    parser.add_argument("--api-key", help=f"default: the environment variable {KEY_VARIABLE}")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: the server's)")
    parser.add_argument(
        "--top-p", type=float, help="keep the likeliest tokens up to this share (default: the server's)"
    )
    parser.add_argument("--max-tokens", type=at_least_one, help="most tokens of an answer (default: the server's)")
    parser.add_argument("--seed", type=int, help="of the draws (default: none)")
    parser.set_defaults(run=run_chat)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME", help="what clients call it (default: MODEL)"
    )
    group.add_argument("--tokenizer", metavar="NAME", help="name or directory (default: the model's)")
    group.add_argument("--revision", help="of the model on the hub (default: its main branch)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")
    group.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU for each replica, or else the CPU)")
    group.add_argument(
        "--load-format", choices=LOAD_FORMATS, default="auto",
        help="dummy: random weights, to measure without loading (default: auto, the checkpoint's)",
    )  # fmt: skip
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
    group.add_argument("--chat-template", metavar="FILE", help="a template or its file (default: the tokenizer's)")
    group.add_argument("--trust-request-chat-template", action="store_true", help="let calls bring their own template")
    group.add_argument(
        "--tool-parser", choices=TOOL_PARSERS, default="auto",
        help="how the model writes tool calls: hermes, in <tool_call> tags; json, as bare JSON; none, it doesn't "
        "(default: auto, any of them)",
    )  # fmt: skip
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE",
        help="of a GPU's memory, for weights and KV pool together (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-model-len",
        type=at_least_one,
        metavar="TOKENS",
        help="of a request (default: what the model's positions allow)",
    )
    group.add_argument(
        "--max-num-seqs",
        type=at_least_one,
        metavar="N",
        help=f"most requests of a step (default: {PagedConfig().max_num_seqs})",
    )
    group.add_argument(
        "--max-num-batched-tokens", type=at_least_one, metavar="TOKENS", help="most of a step (default: by the device)"
    )
    group.add_argument("--tensor-parallel-size", type=int, default=1, help="only 1 is there yet; see --replicas")
    group.add_argument(
        "--seed", type=int, help="of the seeds of sampled calls that bring none (default: the operating system's)"
    )


def _add_listening(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("listening")
    group.add_argument("--host", default=LOOPBACK, help=f"address (default: {LOOPBACK}, this machine alone)")
    group.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    group.add_argument(
        "--root-path", default="", metavar="PATH", help="below which a proxy shows the server, as /llm (default: none)"
    )
    group.add_argument("--ssl-keyfile", metavar="FILE", help="TLS: the private key; needs --ssl-certfile too")
    group.add_argument("--ssl-certfile", metavar="FILE", help="TLS: the certificate; needs --ssl-keyfile too")
    group.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="(default: %(default)s)")
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="(default: %(default)s)")
    group.add_argument("--disable-log-requests", action="store_true", help="no line for each request")


def _add_access(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="needed on every route but /health and /ready; may be given several times. The list of processes shows "
        f"it: --api-key-file and the variable {KEY_VARIABLE} don't",
    )  # fmt: skip
    group.add_argument("--api-key-file", metavar="FILE", help="a key a line")
    group.add_argument("--allow-no-key", action="store_true", help="let other machines in without a key")
    group.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME",
        help="names by which clients reach a server without keys, beside localhost; *: any",
    )  # fmt: skip
    group.add_argument(
        "--allowed-origins", nargs="+", default=[], metavar="ORIGIN",
        help="that pages may call from in browsers (CORS; default: none)",
    )  # fmt: skip


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits of calls and connections")
    _add_numbers(
        group,
        ("max-queue-requests", at_least_one, "N", "requests that may wait; more get 429"),
        ("max-queue-tokens", at_least_one, "TOKENS", "of prompts that may wait; more get 429"),
        ("max-queue-seconds", float, "SECONDS", "that a request may wait for its turn"),
        ("default-timeout", float, "SECONDS", "that a call may take, if it names no timeout"),
        ("max-logprobs", int, "N", "likely tokens that a call may have reported for each token; -1: all there are"),
        ("max-body-bytes", at_least_one, "BYTES", "of a call's body"),
        ("max-connections", at_least_one, "N", "that are open; for one more, the one that waits longest is closed"),
        ("max-connections-per-address", at_least_one, "N", "of them from one client address (a proxy is one client)"),
        ("client-timeout", float, "SECONDS", "that a client may take to send a call, or leave an answer untaken"),
    )


def _add_life(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine processes")
    _add_numbers(
        group,
        ("replicas", at_least_one, "N", "engine processes, a GPU each"),
        ("drain-timeout", float, "SECONDS", "that running requests have after SIGTERM"),
        ("startup-timeout", float, "SECONDS", "that an engine has to become ready"),
        ("watchdog", float, "SECONDS", "without a step after which an engine counts as hung"),
    )
    group.add_argument("--no-spare-engine", action="store_true", help="save the memory of a process that waits at hand")


def _add_numbers(group: argparse._ArgumentGroup, *options: tuple[str, Any, str, str]) -> None:
    """Options of ServerConfig: name, type, unit and what they are."""
    defaults = {field.name: field.default for field in dataclasses.fields(ServerConfig)}
    for name, kind, unit, text in options:
        default = defaults[name.replace("-", "_")]
        shown = "no limit" if default is None else f"{default:g}" if isinstance(default, float) else default
        group.add_argument(f"--{name}", type=kind, default=default, metavar=unit, help=f"{text} (default: {shown})")


def server_config(args: argparse.Namespace) -> ServerConfig:
    """The options that the arguments say.

    Raises:
        ConfigError: one of them is out of range.
    """
    if args.tensor_parallel_size != 1:
        raise ConfigError(f"--tensor-parallel-size {args.tensor_parallel_size} is not there yet; use --replicas")
    options = paged_options(args.option)
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    same = {field.name for field in dataclasses.fields(ServerConfig)} & set(vars(args))
    return ServerConfig(
        **{name: getattr(args, name) for name in same},
        paged=PagedConfig().replace(**options),
        served_model_names=tuple(args.served_model_name),
        api_keys=read_keys(args.api_key, args.api_key_file, os.environ),
        cors_origins=tuple(args.allowed_origins),
        log_requests=not args.disable_log_requests,
        spare_engine=not args.no_spare_engine,
    )


def run_chat(args: argparse.Namespace) -> int:
    """Talk to a server; the exit status."""
    try:
        from hf_paged.server.chat_client import run
    except ModuleNotFoundError as error:
        raise ConfigError(f"hf-paged chat {_EXTRA} ({error.name} is missing)") from error
    return run(args)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal; the exit status."""
    config = server_config(args)
    try:
        from hf_paged.server.serve import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"hf-paged serve {_EXTRA} ({error.name} is missing)") from error
    return serve(config)
