"""`hf-paged bench latency`: a decode step at a fixed number of rows, prefill, and the time to the first token."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hf_paged.arguments import add_model_options, add_options, at_least_one, paged_options
from hf_paged.bench import engines, models, report
from hf_paged.bench.workloads import UNIFORM, Uniform, greedy
from hf_paged.errors import ConfigError
from hf_paged.llm import LLM


def add_parser(subparsers: Any) -> None:
    """Add the command to `hf-paged bench`."""
    parser = subparsers.add_parser(
        "latency",
        help="milliseconds a decode step, prompt tokens a second, seconds to the first token",
        description="Time workloads of one length. A run of all new tokens, less one of a single token, divided by the "
        "tokens between the two, is the time of a step. The last line on stdout is JSON.",
    )
    known = ", ".join(UNIFORM)
    parser.add_argument(
        "--workload", default="B,C,D,E", help=f"some of {known} (default: all); none: the time to the first token alone"
    )
    parser.add_argument("--engine", choices=engines.ENGINES, default="hf_paged", help="default: %(default)s")
    parser.add_argument("--model", help="name or directory (default: a random 8B model)")
    add_model_options(parser)
    parser.add_argument("--repeats", type=at_least_one, default=3, help="runs of each workload (default: 3)")
    add_options(parser)
    report.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the workloads and print what was measured."""
    ours = args.engine == "hf_paged"
    workloads = engines.pick("workload", [name for name in args.workload.split(",") if name != "none"], UNIFORM)
    if not workloads and not ours:
        raise ConfigError(
            f"--workload none times hf_paged's first token; of --engine {args.engine} there is nothing to time"
        )
    model, name = models.load_or_8b(args)
    options = engines.Options(batch_size=64, paged=paged_options(args.option))
    first = round(time_to_first_token(model, options), 3) if ours else None
    if first is not None:
        Console(stderr=True).print(f"from the model on its device to the first token of B: {first:.2f} s")
    measured = measure(model, args.engine, workloads, args.repeats, options) if workloads else {}
    Console().print(_table(measured))
    summary = {
        "benchmark": "latency",
        "engine": args.engine,
        "seconds_to_first_token": first,
        "workloads": measured,
        "environment": report.environment(model, name),
    }
    report.write(summary, args.json)
    return 0


def time_to_first_token(model: Any, options: engines.Options) -> float:
    """Seconds from a model on its device to the first token of workload B, the engine built on the way."""
    (item,) = UNIFORM["B"].items(models.vocabulary(model), seed=-1)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    began = time.perf_counter()
    with LLM(model, skip_tokenizer_init=True, **options.paged) as llm:
        llm.generate([item.prompt_token_ids], greedy(1), use_tqdm=False)
        return time.perf_counter() - began


def measure(
    model: Any, engine: str, workloads: Sequence[str], repeats: int, options: engines.Options
) -> dict[str, dict[str, Any]]:
    """For each workload its median and all its runs: ms a step, or prompt tokens a second."""
    found: dict[str, dict[str, Any]] = {}
    with engines.ENGINES[engine](model, options) as serve:
        for name in workloads:
            shape = UNIFORM[name]
            _run(serve, shape, model, seed=0)  # what is of first use in this shape
            values = [_value(serve, shape, model, seed=1 + 2 * repeat) for repeat in range(repeats)]
            unit = "ms/step" if shape.output > 1 else "prompt tok/s"
            found[name] = {"unit": unit, "median": round(statistics.median(values), 3), "runs": values}
    return found


def _value(serve: engines.Serve, shape: Uniform, model: Any, seed: int) -> float:
    short = _run(serve, shape, model, seed, output=1)
    if shape.output == 1:
        return round(shape.requests * shape.prompt / short, 1)
    long = _run(serve, shape, model, seed + 1)
    return round(1000 * (long - short) / (shape.output - 1), 4)


def _run(serve: engines.Serve, shape: Uniform, model: Any, seed: int, output: int | None = None) -> float:
    return serve(shape.items(models.vocabulary(model), seed, output)).seconds


def _table(measured: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, found in measured.items():
        shape, runs = UNIFORM[name], " ".join(f"{value:g}" for value in found["runs"])
        sizes = map(str, (shape.requests, shape.prompt, shape.output))
        rows.append([name, *sizes, f"{found['median']:g}", found["unit"], runs])
    return report.table("latency", ("workload", "requests", "prompt", "new", "median", "unit", "all runs"), rows)
