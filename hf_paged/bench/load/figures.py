"""What a run came to: percentiles, throughput, errors, and goodput under an objective."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from hf_paged.bench.load.client import Timed
from hf_paged.errors import ConfigError

SHARES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a request has to keep to in order to count as served well, in seconds; None: no limit.

    Attributes:
        ttft: to its first token. tpot: a token after it, on average. e2e: to its end.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> Objective:
        """From 'ttft=0.5,tpot=0.05,e2e=10', in seconds.

        Raises:
            ConfigError: a name is unknown or a number isn't one.
        """
        limits: dict[str, float] = {}
        names = [field.name for field in dataclasses.fields(cls)]
        for part in filter(None, (text or "").split(",")):
            name, _, value = part.partition("=")
            try:
                limits[name.strip()] = float(value)
            except ValueError:
                limits[name.strip()] = -1.0
            if name.strip() not in names or limits[name.strip()] <= 0:
                raise ConfigError(f"--slo takes NAME=SECONDS for {', '.join(names)}, got {part!r}")
        return cls(**limits)

    def kept(self, timed: Timed) -> bool:
        """Whether a request was served, and well."""
        measured = {"ttft": timed.ttft, "tpot": timed.per_token or 0.0, "e2e": timed.latency}
        limits = dataclasses.asdict(self)
        return timed.error is None and all(
            limits[name] is None or value <= limits[name] for name, value in measured.items()
        )


def summarise(requests: Sequence[Timed], objective: Objective) -> dict[str, Any]:
    """Figures over a run, times in seconds. Percentiles are of the requests that were served."""
    good = [timed for timed in requests if timed.error is None]
    seconds = max(timed.end for timed in requests) - min(timed.start for timed in requests)
    tokens = sum(timed.output_tokens for timed in requests)
    kept = sum(map(objective.kept, requests))
    return {
        "requests": len(requests),
        "completed": len(good),
        "errors": dict(collections.Counter(timed.error for timed in requests if timed.error).most_common(10)),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3),
        "prompt_tokens": sum(timed.prompt_tokens for timed in good),
        "output_tokens": tokens,
        "output_tokens_per_second": round(tokens / seconds, 2),
        "ttft": spread([timed.ttft for timed in good]),
        "inter_token": spread([gap for timed in good for gap in timed.gaps]),
        "tpot": spread([each for timed in good if (each := timed.per_token) is not None]),
        "e2e": spread([timed.latency for timed in good]),
        "slo": dataclasses.asdict(objective),
        "goodput": {"requests_per_second": round(kept / seconds, 3), "share": round(kept / len(requests), 4)},
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum, or None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    found = {
        "mean": sum(ordered) / len(ordered),
        **{name: percentile(ordered, share) for name, share in SHARES.items()},
    }
    return {name: round(value, 6) for name, value in {**found, "max": ordered[-1]}.items()}


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted values don't exceed, interpolated between its neighbours."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def milliseconds(seconds: float) -> str:
    """Seconds as the table and the picture show them."""
    return f"{1000 * seconds:,.1f}"
