"""What a benchmark found: as tables for people, and as one line of JSON, last on stdout, for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hf_paged._version import __version__
from hf_paged.bench.run import Run
from hf_paged.hf import compat

MIB = 2**20


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there too")


def write(summary: Mapping[str, Any], path: Path | None) -> None:
    """Print the summary, and write it to `path`."""
    line = json.dumps(summary)
    if path is not None:
        path.write_text(line + "\n")
    print(line)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of names, in its first column, and figures."""
    found = Table(title=title)
    for index, column in enumerate(columns):
        found.add_column(column, justify="right" if index else "left")
    for row in rows:
        found.add_row(*row)
    return found


def client() -> dict[str, Any]:
    """What has to be known of this process to repeat a run; an API key is left out."""
    arguments = sys.argv[1:]
    shown = ["…" if before == "--api-key" else text for before, text in zip(["", *arguments], arguments, strict=False)]
    shown = ["--api-key=…" if text.startswith("--api-key=") else text for text in shown]
    return {
        "command": shlex.join(["hf-paged", *shown]),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "hf_paged": __version__,
    }


def environment(model: Any, name: str) -> dict[str, Any]:
    """What has to be known to repeat a run on a model."""
    device, processor = model.device, platform.processor() or platform.machine()
    return client() | {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({processor})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": compat.release(),
    }


def summarise(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """For each engine its speeds, their median and its KV use; and the first engine's speed over each other's.

    A ratio is the median of the ratios of runs that followed each other, so that a machine that slows down for a while
    slows both sides.
    """
    (first, ours), *others = runs.items()
    return {
        "engines": {name: _engine(found) for name, found in runs.items()},
        "ratios": {f"{first}/{name}": _ratio(ours, theirs) for name, theirs in others},
        "identical": {f"{first}/{name}": _identical(ours[0], theirs[0]) for name, theirs in others},
    }


def _engine(runs: Sequence[Run]) -> dict[str, Any]:
    kv, speeds = runs[-1].kv, [run.tokens_per_second for run in runs]
    wasted = {"wasted_tokens": kv.reserved_tokens - kv.used_tokens, "waste": round(kv.waste, 4)}
    return {
        "requests": len(runs[-1].outputs),
        "useful_tokens": runs[-1].tokens,
        "seconds": [round(run.seconds, 3) for run in runs],
        "tokens_per_second": [round(speed, 2) for speed in speeds],
        "median_tokens_per_second": round(statistics.median(speeds), 2),
        "kv": dataclasses.asdict(kv) | wasted,
    }


def _ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return round(statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs), 3)


def _identical(ours: Run, theirs: Run) -> str:
    """How many of the rows that both have are the same, as '32/32'."""
    # An engine may have been given only the first few of the requests.
    rows = min(len(ours.outputs), len(theirs.outputs))
    return f"{sum(a == b for a, b in zip(ours.outputs, theirs.outputs, strict=False))}/{rows}"


def comparison(summary: Mapping[str, Any]) -> Table:
    """The table of what `summarise` returned."""
    columns = ["engine", "requests", "tok/s (median)", "all runs", "ratio", "same rows"]
    columns += ["KV slots reserved", "used", "wasted", "peak MiB"]
    first, rows = next(iter(summary["engines"])), []
    for name, found in summary["engines"].items():
        kv, pair = found["kv"], f"{first}/{name}"
        row = [name, str(found["requests"]), f"{found['median_tokens_per_second']:.1f}"]
        row.append(" ".join(f"{value:.1f}" for value in found["tokens_per_second"]))
        row.append(f"{summary['ratios'][pair]:.2f}x slower" if pair in summary["ratios"] else "")
        row.append(summary["identical"].get(pair, ""))
        row += [f"{kv['reserved_tokens']:,}", f"{kv['used_tokens']:,}", f"{kv['waste']:.1%}"]
        rows.append([*row, f"{kv['peak_bytes'] / MIB:.1f}"])
    return table("useful tokens a second, and KV memory", columns, rows)
