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
from hf_paged.bench import engines, models, output, report
from hf_paged.bench.workloads import UNIFORM, Item, Uniform
from hf_paged.errors import ConfigError
from hf_paged.llm import LLM
from hf_paged.params import SamplingParams


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
    parser.add_argument("--engine", default="hf_paged", help=f"one of {', '.join(engines.ENGINES)}")
    parser.add_argument("--model", help="name or directory (default: a random 8B model)")
    add_model_options(parser)
    parser.add_argument("--repeats", type=at_least_one, default=3, help="runs of each workload (default: 3)")
    add_options(parser)
    output.add_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the workloads and print what was measured."""
    console = Console(stderr=True)
    (engine,) = engines.pick([args.engine])
    workloads = _pick(args.workload)
    if not workloads and engine != "hf_paged":
        raise ConfigError(
            f"--workload none times hf_paged's first token; of --engine {engine} there is nothing to time"
        )
    model, name = models.load_or_8b(args)
    options = engines.Options(batch_size=64, paged=paged_options(args.option))
    first = None
    if engine == "hf_paged":
        first = time_to_first_token(model, options)
        console.print(f"from the model on its device to the first token of B: {first:.2f} s")
    measured = measure(model, engine, workloads, args.repeats, options) if workloads else {}
    summary = {
        "benchmark": "latency",
        "engine": engine,
        "seconds_to_first_token": first and round(first, 3),
        "workloads": measured,
        "environment": report.environment(model, name),
    }
    _show(measured, Console())
    output.write(summary, args.json)
    return 0


def time_to_first_token(model: Any, options: engines.Options) -> float:
    """Seconds from a model on its device to the first token of workload B, the engine built on the way."""
    (item,) = UNIFORM["B"].items(models.vocabulary(model), seed=-1)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    began = time.perf_counter()
    with LLM(model, skip_tokenizer_init=True, **options.paged) as llm:
        llm.generate([item.prompt_token_ids], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
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
    items: list[Item] = shape.items(models.vocabulary(model), seed, output)
    return serve(items).seconds


def _pick(text: str) -> list[str]:
    names = [name for name in text.split(",") if name and text != "none"]
    for name in names:
        if name not in UNIFORM:
            raise ConfigError(f"unknown workload {name!r}; known are {', '.join(UNIFORM)}")
    return names


def _show(measured: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="latency")
    for column in ("workload", "requests", "prompt", "new", "median", "unit", "all runs"):
        table.add_column(column, justify="left" if column in ("workload", "unit") else "right")
    for name, found in measured.items():
        shape = UNIFORM[name]
        runs = " ".join(f"{value:g}" for value in found["runs"])
        table.add_row(
            name, str(shape.requests), str(shape.prompt), str(shape.output), f"{found['median']:g}", found["unit"], runs
        )
    console.print(table)
