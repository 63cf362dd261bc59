"""`hf-paged bench throughput`: the same requests for each engine, the engines taking turns."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_paged.arguments import add_model_options, add_options, at_least_one, paged_options, parse_options
from hf_paged.bench import engines, models, profile, report, workloads
from hf_paged.bench.demo import smollm2
from hf_paged.bench.run import Run
from hf_paged.errors import ConfigError
from hf_paged.hf.load import model_for


def add_parser(subparsers: Any) -> None:
    """Add the command to `hf-paged bench`."""
    parser = subparsers.add_parser(
        "throughput",
        help="useful tokens a second over a workload, for one or several engines",
        description="Give the same requests to each engine, in turn, and compare. The last line on stdout is JSON.",
    )
    known = ", ".join(engines.ENGINES)
    parser.add_argument(
        "--engine",
        action="append",
        metavar="NAME[,NAME…]",
        help=f"engines to run: {known}; the first is compared with the others (default: hf_paged)",
    )
    parser.add_argument("--workload", default="cpu", help="A, cpu, or a file of JSON lines (default: cpu)")
    parser.add_argument(
        "--model", help="name or directory (default: SmolLM2-135M-Instruct for cpu; a random 8B model for A)"
    )
    add_model_options(parser)
    parser.add_argument("--repeats", type=at_least_one, default=3, help="runs of each engine (default: 3)")
    parser.add_argument("--batch-size", type=at_least_one, default=8, help="rows of a static batch (default: 8)")
    parser.add_argument(
        "--limit", metavar="N|ENGINE=N[,…]", help="only the first N requests, for every engine or for the named ones"
    )
    add_options(parser)
    parser.add_argument(
        "--batching-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of Transformers' ContinuousBatchingConfig; may be given several times",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="run hf_paged once more, write a trace of some steps there (for Perfetto), and tell how busy the GPU was",
    )
    report.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the comparison and print it."""
    console = Console(stderr=True)
    names = engines.pick("engine", args.engine or ["hf_paged"])
    limits = parse_limit(args.limit, names)
    options = engines.Options(args.batch_size, paged_options(args.option), parse_options(args.batching_option))
    model, called = _model(args)
    workload = workloads.load(args.workload, models.vocabulary(model))
    console.print(
        f"workload {workload.name}: {len(workload.items)} requests, {workload.prompt_tokens:,} prompt tokens, "
        f"{workload.output_tokens:,} tokens asked for; {args.repeats} runs of {', '.join(names)}, in turn"
    )
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for repeat, name in itertools.product(range(args.repeats), names):  # taking turns: a machine's speed may drift
        found = engines.measure(name, model, workload.items[: limits.get(name)], options)
        runs[name].append(found)
        console.print(
            f"run {repeat + 1}/{args.repeats} {name}: {found.tokens:,} tokens in {found.seconds:.1f} s, "
            f"{found.tokens_per_second:.1f} tok/s"
        )
    summary: dict[str, Any] = {
        "benchmark": "throughput",
        "workload": workload.name,
        "requests": len(workload.items),
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
        **report.summarise(runs),
        "environment": report.environment(model, called),
    }
    Console().print(report.comparison(summary))
    if args.profile:
        summary["profile"] = profile.run(model, workload.items, options.paged, args.profile)
        Console().print(profile.table(summary["profile"]))
    report.write(summary, args.json)
    return 0


def parse_limit(text: str | None, names: Sequence[str]) -> dict[str, int]:
    """How many requests each engine gets, from 'N' (all of them) or 'ENGINE=N,…'.

    Raises:
        ConfigError: a number isn't one, or an engine doesn't take part.
    """
    if text is None:
        return {}
    if "=" not in text:
        return dict.fromkeys(names, _count(text))
    pairs = [part.split("=", 1) if "=" in part else [part, ""] for part in text.split(",")]
    for name, _ in pairs:
        if name not in names:
            raise ConfigError(f"--limit names {name!r}, which isn't run; run are {', '.join(names)}")
    return {name: _count(count) for name, count in pairs}


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--limit must be a number of at least 1, or ENGINE=N, got {text!r}")
    return int(text)


def _model(args: argparse.Namespace) -> tuple[Any, str]:
    """The model to run on, and what to call it."""
    if args.model or args.workload == "A":
        return models.load_or_8b(args)
    folder = smollm2.ensure(Console(stderr=True).print)
    return model_for(str(folder), args.device, args.dtype), smollm2.NAME
