"""What a comparison found, for people and for programs."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hf_paged._version import __version__
from hf_paged.bench.run import Run
from hf_paged.hf import compat

MIB = 2**20


def environment(model: Any, name: str) -> dict[str, Any]:
    """What has to be known to repeat a run."""
    device = model.device
    return {
        "command": shlex.join(["hf-paged", *sys.argv[1:]]),
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({_processor()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": compat.release(),
        "hf_paged": __version__,
    }


def summarise(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """For each engine its speeds, their median and its KV use; and the first engine's speed over each other's.

    A ratio is the median of the ratios of runs that followed each other, so that a machine that slows down for a while
    slows both sides.
    """
    names = list(runs)
    return {
        "engines": {name: _engine(found) for name, found in runs.items()},
        "ratios": {f"{names[0]}/{name}": _ratio(runs[names[0]], runs[name]) for name in names[1:]},
        "identical": {f"{names[0]}/{name}": _identical(runs[names[0]][0], runs[name][0]) for name in names[1:]},
    }


def _engine(runs: Sequence[Run]) -> dict[str, Any]:
    kv = runs[-1].kv
    return {
        "requests": len(runs[-1].outputs),
        "useful_tokens": runs[-1].tokens,
        "seconds": [round(run.seconds, 3) for run in runs],
        "tokens_per_second": [round(run.tokens_per_second, 2) for run in runs],
        "median_tokens_per_second": round(statistics.median(run.tokens_per_second for run in runs), 2),
        "kv": {
            **dataclasses.asdict(kv),
            "wasted_tokens": kv.reserved_tokens - kv.used_tokens,
            "waste": round(kv.waste, 4),
        },
    }


def _ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return round(statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs), 3)


def _identical(ours: Run, theirs: Run) -> str:
    """How many of the rows that both have are the same, as '32/32'."""
    # An engine may have been given only the first few of the requests.
    rows = min(len(ours.outputs), len(theirs.outputs))
    return f"{sum(a == b for a, b in zip(ours.outputs, theirs.outputs, strict=False))}/{rows}"


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print a summary as a table."""
    table = Table(title="useful tokens a second, and KV memory")
    for column in ("engine", "requests", "tok/s (median)", "all runs", "ratio", "same rows"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for column in ("KV slots reserved", "used", "wasted", "peak MiB"):
        table.add_column(column, justify="right")
    first = next(iter(summary["engines"]))
    for name, found in summary["engines"].items():
        kv, pair = found["kv"], f"{first}/{name}"
        table.add_row(
            name,
            str(found["requests"]),
            f"{found['median_tokens_per_second']:.1f}",
            " ".join(f"{value:.1f}" for value in found["tokens_per_second"]),
            f"{summary['ratios'][pair]:.2f}x slower" if pair in summary["ratios"] else "",
            summary["identical"].get(pair, ""),
            f"{kv['reserved_tokens']:,}",
            f"{kv['used_tokens']:,}",
            f"{kv['waste']:.1%}",
            f"{kv['peak_bytes'] / MIB:.1f}",
        )
    console.print(table)


def _processor() -> str:
    return platform.processor() or platform.machine()
