"""What the page is told: one dict, made when somebody looks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hf_paged_dashboard.window import Counts, Times

if TYPE_CHECKING:
    from hf_paged.server.messages import BlockGroup, EngineStats
    from hf_paged.server.stats import RequestRecord, ServerStats

HISTORY = 120  # seconds of the curves
WINDOW = 60  # seconds of the percentiles
MOST_REQUESTS = 200  # listed; the counts are of all
WATCHED = 5.0  # seconds for which the engines send their blocks after somebody looked


class State:
    """Hears what the server does, and tells it.

    Args:
        stats: the server's.
        lifecycle: with the phase that it is in.
        model: the name that it is served by.
    """

    def __init__(self, stats: ServerStats, lifecycle: Any, model: str) -> None:
        self._stats = stats
        self._lifecycle = lifecycle
        self._model = model
        self._began = time.monotonic()
        self._output, self._prompt = Counts(HISTORY), Counts(HISTORY)
        self._first, self._gaps, self._whole = Times(WINDOW), Times(WINDOW), Times(WINDOW)
        stats.subscribe(self)

    # -------------------------------------------------------------------------------------- what the server tells

    def tokens(self, record: RequestRecord, count: int, gap: float | None) -> None:
        """New tokens of a request."""
        self._output.add(count)
        if gap is not None:
            self._gaps.add(gap / count, count)
        elif record.time_to_first_token is not None:
            self._first.add(record.time_to_first_token)

    def request_finished(self, record: RequestRecord) -> None:
        """A request is over."""
        if record.finish_reason in ("stop", "length") and record.latency is not None:
            self._whole.add(record.latency)

    def engine_stats(self, stats: EngineStats) -> None:
        """A replica reports."""
        prefill = sum(step.prefill_tokens for step in stats.steps)
        if prefill:
            self._prompt.add(prefill)

    # ------------------------------------------------------------------------------------------ what the page asks

    def snapshot(self) -> dict[str, Any]:
        """The present state, as JSON takes it. Has the engines send their blocks for the next seconds."""
        self._stats.watch_blocks(WATCHED)
        phase = getattr(self._lifecycle, "phase", None)
        requests = self._requests()
        return {
            "model": self._model,
            "phase": getattr(phase, "value", "ready"),
            "uptime": time.monotonic() - self._began,
            "counts": {state: sum(one["state"] == state for one in requests) for state in ("running", "waiting")},
            "requests": requests[:MOST_REQUESTS],
            "engines": [_engine(stats) for _, stats in sorted(self._stats.engines.items())],
            "totals": self._totals(),
            "series": {"output": self._output.series(), "prompt": self._prompt.series()},
            "latency": {
                "ttft": self._first.percentiles(0.5, 0.9, 0.99),
                "inter_token": self._gaps.percentiles(0.5, 0.9, 0.99),
                "e2e": self._whole.percentiles(0.5, 0.9, 0.99),
            },
        }

    def _requests(self) -> list[dict[str, Any]]:
        """Every live request: those in a batch, oldest first, then those that wait."""
        batched = {name for stats in self._stats.engines.values() for name in stats.running}
        records = [*self._stats.running.values(), *self._stats.waiting.values()]
        found = [_request(record, record.request_id in batched or record.first_token is not None) for record in records]
        return sorted(found, key=lambda one: (one["state"] != "running", -one["age"]))

    def _totals(self) -> dict[str, Any]:
        names = ("requests", "prompt_tokens", "cached_tokens", "output_tokens", "prefix_queries", "prefix_hits")
        more = ("preemptions", "restarts", "finished", "refused")
        return {name: getattr(self._stats.totals, name) for name in (*names, *more)}


def _request(record: RequestRecord, running: bool) -> dict[str, Any]:
    return {
        "id": record.request_id,
        "client_id": record.client_id,
        "state": "running" if running else "waiting",
        "replica": record.replica,
        "prompt": record.prompt_tokens,
        "cached": record.cached_tokens,
        "output": record.output_tokens,
        "max": record.max_tokens,
        "age": time.monotonic() - record.arrival,
        "ttft": record.time_to_first_token,
        "preemptions": record.preemptions,
        "resumed": record.resumed,
    }


def _engine(stats: EngineStats) -> dict[str, Any]:
    return {
        "replica": stats.replica,
        "num_blocks": stats.num_blocks,
        "num_free": stats.num_free,
        "block_size": stats.block_size,
        "kv_usage": stats.kv_usage,
        "running": len(stats.running),
        "waiting": len(stats.waiting),
        "busy": stats.busy,
        "groups": [_group(group) for group in stats.groups],
    }


def _group(group: BlockGroup) -> dict[str, Any]:
    blocks = group.blocks
    return {
        "window": group.window,
        "num_blocks": group.num_blocks,
        "num_free": group.num_free,
        "blocks": None if blocks is None else {name: runs(ids) for name, ids in blocks.items()},
    }


def runs(ids: Iterable[int]) -> list[list[int]]:
    """Block ids as stretches (first, how many), without the null block: most requests' blocks lie in a few rows."""
    found: list[list[int]] = []
    for block in sorted(set(ids)):
        if block <= 0:
            continue
        if found and block == found[-1][0] + found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([block, 1])
    return found
