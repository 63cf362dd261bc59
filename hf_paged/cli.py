"""`hf-paged`: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_paged import plugins
from hf_paged._version import __version__
from hf_paged.arguments import add_model_options, add_options, paged_options
from hf_paged.bench import kernels, latency, logprobs, serve, soak, throughput
from hf_paged.bench.demo import commands
from hf_paged.config import PagedConfig
from hf_paged.errors import HFPagedError
from hf_paged.hf.explain import explain
from hf_paged.hf.load import model_for
from hf_paged.server.commands import add_chat_parser, add_serve_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors that hf_paged raises on purpose become one line on stderr and status 2."""
    try:
        args = build_parser().parse_args(argv)
        return args.run(args) or 0
    except HFPagedError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"hf-paged: error: {error}{notes}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of `hf-paged`, with the commands of the plugins.

    Raises:
        PluginError: a plugin can't be loaded, or raised.
    """
    parser = argparse.ArgumentParser(
        prog="hf-paged", description="Paged attention and continuous batching for Hugging Face Transformers models."
    )
    parser.add_argument("--version", action="version", version=f"hf-paged {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.add_demo_parser(subparsers)
    commands.add_generate_parser(subparsers)
    add_serve_parser(subparsers)
    add_chat_parser(subparsers)
    _add_bench_parser(subparsers)
    _add_check_parser(subparsers)
    _add_plugins_parser(subparsers)
    plugins.call(plugins.load(PagedConfig()), "register_cli", subparsers=subparsers)
    return parser


def _add_bench_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="measure, and compare with other engines")
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    throughput.add_parser(benchmarks)
    latency.add_parser(benchmarks)
    logprobs.add_parser(benchmarks)
    soak.add_parser(benchmarks)
    kernels.add_parser(benchmarks)
    serve.add_parser(benchmarks)


def _add_check_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "check",
        help="tell how a model would be carried, and why",
        description="Load a model, try it on the paged engine, and tell what a plain generate() would run on, and why. "
        "The exit status is 0 where the engine carries it, 1 where Transformers does, 2 on errors.",
    )
    parser.add_argument("model", metavar="MODEL", help="name or directory")
    add_model_options(parser)
    add_options(parser)
    parser.set_defaults(run=_check)


def _add_plugins_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plugins", help="list the plugins that are loaded, where they come from, and their hooks"
    )
    parser.set_defaults(run=_plugins)


def _check(args: argparse.Namespace) -> int:
    options = paged_options(args.option)
    explanation = explain(model_for(args.model, args.device, args.dtype), **options)
    print(explanation)
    return 0 if explanation.path != "stock" else 1


def _plugins(args: argparse.Namespace) -> int:
    table = Table("plugin", "from", "hooks")
    manager = plugins.load(PagedConfig())
    for name, origin in plugins.loaded(manager):
        table.add_row(name, origin, ", ".join(plugins.hooks_of(manager, name)))
    Console().print(table)
    return 0
