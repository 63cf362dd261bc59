"""Listener: hears what the server does, and counts it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hf_paged_metrics.metrics import Metrics

if TYPE_CHECKING:
    from hf_paged.server.messages import EngineStats
    from hf_paged.server.stats import RequestRecord

_COUNTED = {  # of EngineStats, since its process began -> counter
    "prefix_queries": "prefix_cache_queries",
    "prefix_hits": "prefix_cache_hits",
    "preemptions": "num_preemptions",
}


class Listener:
    """Turns the events of `ServerStats` into metrics. Used in the event loop alone.

    Args:
        metrics: where to count.
        model: the name that the model is served by.
        prefix_caching: whether it is on.
    """

    def __init__(self, metrics: Metrics, model: str, prefix_caching: bool) -> None:
        self._metrics = metrics
        self._model = model
        self._prefix_caching = prefix_caching
        self._series: dict[int, _Series] = {}
        self._live: dict[str, RequestRecord] = {}
        self._seen: dict[int, EngineStats] = {}
        self._counted = 0.0
        self._of(0)  # every series is there from the start, at 0

    # -------------------------------------------------------------------------------------- what the server tells

    def request_started(self, record: RequestRecord) -> None:
        """A request was accepted: it waits."""
        self._live[record.request_id] = record
        self._count_waiting()

    def tokens(self, record: RequestRecord, count: int, gap: float | None) -> None:
        """New tokens of a request."""
        series = self._of(record.replica)
        series.counters["generation_tokens"].inc(count)
        if gap is not None:
            for _ in range(count):  # tokens that came together share the time since those before
                series.histograms["inter_token_latency_seconds"].observe(gap / count)
            return
        series.counters["prompt_tokens"].inc(record.prompt_tokens)
        series.counters["prompt_tokens_cached"].inc(record.cached_tokens)
        _observe(series, "time_to_first_token_seconds", record.time_to_first_token)

    def request_finished(self, record: RequestRecord) -> None:
        """A request is over. One that the engine refused never ran: `request_refused` hears of it too."""
        self._live.pop(record.request_id, None)
        self._count_waiting()
        if record.finish_reason == "refused":
            return
        series = self._of(record.replica)
        self._metrics.finished.labels(*series.labels, record.finish_reason or "error").inc()
        if record.index == 0:
            _observe(series, "request_params_n", record.n)
        inference = None if record.prefill is None else record.prefill + (record.decode or 0.0)
        per_token = None
        if record.output_tokens > 1 and record.decode is not None:
            per_token = record.decode / (record.output_tokens - 1)
        for name, value in (
            ("request_params_max_tokens", record.max_tokens),
            ("request_prompt_tokens", record.prompt_tokens),
            ("request_generation_tokens", record.output_tokens),
            ("e2e_request_latency_seconds", record.latency),
            ("request_queue_time_seconds", record.queue),
            ("request_prefill_time_seconds", record.prefill),
            ("request_decode_time_seconds", record.decode),
            ("request_inference_time_seconds", inference),
            ("request_time_per_output_token_seconds", per_token),
        ):
            _observe(series, name, value)

    def request_refused(self, reason: str) -> None:
        """A request was turned away."""
        self._metrics.refused.labels(self._model, reason).inc()

    def engine_stats(self, stats: EngineStats) -> None:
        """A replica reports."""
        series, before = self._of(stats.replica), self._seen.get(stats.replica)
        if before is not None and stats.num_steps < before.num_steps:
            before = None  # another process, which counts from 0
        for name, counter in _COUNTED.items():
            series.counters[counter].inc(max(0, getattr(stats, name) - (getattr(before, name) if before else 0)))
        for step in stats.steps:
            series.histograms["iteration_tokens_total"].observe(step.prefill_tokens + step.decode_tokens)
        self._seen[stats.replica] = stats
        series.gauges["num_requests_running"].set(len(stats.running))
        series.gauges["kv_cache_usage_perc"].set(stats.kv_usage)
        self._tell_cache(series, stats)
        self._count_waiting(now=True)

    def engine_restarted(self, replica: int, why: str) -> None:
        """A replica's process died; another one counts from 0."""
        self._seen.pop(replica, None)
        series = self._of(replica)
        series.counters["engine_restarts"].inc()
        for gauge in ("num_requests_running", "kv_cache_usage_perc"):
            series.gauges[gauge].set(0)
        self._count_waiting(now=True)

    # ------------------------------------------------------------------------------------------------------ parts

    def _of(self, replica: int | None) -> _Series:
        """A replica's series; what never reached a replica counts for the first."""
        index = replica or 0
        if index not in self._series:
            self._series[index] = _Series(self._metrics, (self._model, str(index)))
        return self._series[index]

    def _count_waiting(self, *, now: bool = False) -> None:
        """What lives and isn't in a batch. A request that no replica has yet counts for the first.

        It is counted anew ten times a second at most, and with each report of a replica.
        """
        if not now and time.monotonic() < self._counted + 0.1:
            return
        self._counted = time.monotonic()
        counts = dict.fromkeys(self._series, 0)
        for record in self._live.values():
            counts[record.replica or 0] = counts.get(record.replica or 0, 0) + 1
        for replica, count in counts.items():
            running = len(self._seen[replica].running) if replica in self._seen else 0
            self._of(replica).gauges["num_requests_waiting"].set(max(0, count - running))

    def _tell_cache(self, series: _Series, stats: EngineStats) -> None:
        told = (*series.labels, str(stats.block_size), str(stats.num_blocks), str(self._prefix_caching))
        if told == series.cache:
            return
        if series.cache is not None:  # the pool grew
            self._metrics.cache.remove(*series.cache)
        series.cache = told
        self._metrics.cache.labels(*told).set(1)


class _Series:
    """The metrics of one replica: looking them up by label costs more than counting.

    Attributes:
        cache: the labels under which its KV pool was told last.
    """

    def __init__(self, metrics: Metrics, labels: tuple[str, str]) -> None:
        self.labels = labels
        self.cache: tuple[str, ...] | None = None
        self.gauges: dict[str, Any] = {name: metric.labels(*labels) for name, metric in metrics.gauges.items()}
        self.counters: dict[str, Any] = {name: metric.labels(*labels) for name, metric in metrics.counters.items()}
        self.histograms: dict[str, Any] = {name: metric.labels(*labels) for name, metric in metrics.histograms.items()}


def _observe(series: _Series, name: str, value: float | None) -> None:
    if value is not None:
        series.histograms[name].observe(value)
