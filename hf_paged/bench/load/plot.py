"""A run as a picture: how long people waited, and what the server gave over time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_paged.bench.load import figures
from hf_paged.bench.load.client import Timed

INK, MUTED, GRID = "#1b1f24", "#59636e", "#e4e7eb"
BLUE, ORANGE, GREEN = "#2563b8", "#c2571a", "#1a7f4b"
MARKED = ("p50", "p99")


def draw(requests: Sequence[Timed], summary: dict[str, Any], path: Path) -> None:
    """Write a picture of a run: distributions of the three latencies, and tokens and requests over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [timed for timed in requests if timed.error is None]
    limits = summary["slo"]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    ttft, gaps = [timed.ttft for timed in good], [gap for timed in good for gap in timed.gaps]
    latency = [timed.latency for timed in good]
    _distribution(axes[0, 0], "Time to first token", ttft, summary["ttft"], limits["ttft"])
    _distribution(axes[0, 1], "Time between tokens", gaps, summary["inter_token"], None)
    _distribution(axes[1, 0], "End to end", latency, summary["e2e"], limits["e2e"])
    _over_time(axes[1, 1], requests)
    served = f"{summary['completed']} of {summary['requests']} requests served"
    speed = f"{summary['output_tokens_per_second']:,.0f} output tokens/s"
    figure.suptitle(
        f"{summary['workload']} · {_load(summary['load'])} · {served} · {speed}",
        color=INK,
        fontsize=12,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _load(load: dict[str, Any]) -> str:
    if load["loop"] == "closed":
        return f"{load['concurrency']} at a time"
    return "all at once" if load["rate"] is None else f"{load['rate']:g} requests/s"


def _distribution(
    axis: Any, title: str, seconds: Sequence[float], spread: Mapping[str, float] | None, limit: float | None
) -> None:
    """The share of requests that waited at most a number of milliseconds, with percentiles marked on it.

    Args:
        spread: the percentiles of `seconds`, which the table shows too; None of nothing.
        limit: in seconds, drawn as a line.
    """
    _style(axis, title, "milliseconds", "share no longer")
    if spread is None:
        axis.text(0.5, 0.5, "nothing to show", transform=axis.transAxes, ha="center", color=MUTED)
        return
    ordered = sorted(1000 * value for value in seconds)
    shares = [index / max(1, len(ordered) - 1) for index in range(len(ordered))]  # as `figures.percentile` has them
    axis.plot(ordered, shares, color=BLUE, linewidth=1.8)
    for name in MARKED:
        value, share = 1000 * spread[name], figures.SHARES[name]
        axis.plot([value], [share], "o", color=ORANGE, markersize=5)
        text = f"{name} {figures.milliseconds(spread[name])} ms"
        right = value > ordered[-1] / 2  # the words lie on the side where there is room
        place: dict[str, Any] = {"xytext": (-8 if right else 8, -12), "ha": "right" if right else "left"}
        axis.annotate(text, (value, share), textcoords="offset points", color=INK, fontsize=9, **place)
    if limit is not None:
        axis.axvline(1000 * limit, color=GREEN, linestyle="--", linewidth=1.2)
    axis.set_ylim(0, 1.03)
    axis.set_xlim(0, max(ordered[-1] * 1.08, 1e-3))


def _over_time(axis: Any, requests: Sequence[Timed]) -> None:
    """Requests in flight, and texts a second, in a hundred parts of the run."""
    _style(axis, "Over the run", "seconds", "requests in flight")
    began, ended = min(t.start for t in requests), max(t.end for t in requests)
    width = max((ended - began) / 100, 1e-6)
    tokens = [0] * 101
    for timed in requests:
        if timed.first is None:
            continue
        for at in itertools.accumulate(timed.gaps, initial=timed.first):
            tokens[min(100, int((at - began) / width))] += 1
    times = [width * index for index in range(101)]
    inside = [sum(t.start - began <= at < t.end - began for t in requests) for at in times]
    axis.fill_between(times, inside, color=BLUE, alpha=0.16, linewidth=0)
    axis.plot(times, inside, color=BLUE, linewidth=1.4)
    axis.set_ylim(0)
    other = axis.twinx()
    other.plot(times, [count / width for count in tokens], color=ORANGE, linewidth=1.4)
    other.set_ylim(0)
    other.set_ylabel("tokens a second", color=ORANGE)
    other.tick_params(colors=MUTED)
    axis.yaxis.label.set_color(BLUE)
    for side in ("top", "left"):
        other.spines[side].set_visible(False)


def _style(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", color=INK, fontsize=11)
    axis.set_xlabel(x, color=MUTED)
    axis.set_ylabel(y, color=MUTED)
    axis.tick_params(colors=MUTED)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
