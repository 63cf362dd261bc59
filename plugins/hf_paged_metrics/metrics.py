"""Which metrics there are: name, meaning, labels, buckets."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "hf_paged:"
LABELS = ("model_name", "engine")  # the name that the model is served by, and the replica's index

# Bounds in seconds, each about one and a half to two times the one before, where the measured values lie.
TOKEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
FIRST = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
WHOLE = (
    0.01,
    0.05,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    1.5,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1800.0,
)
TOKENS = tuple(float(2**power) for power in range(18))  # 1 to 131,072
SMALL = (1.0, 2.0, 5.0, 10.0, 20.0)

GAUGES = {
    "num_requests_running": "Requests in the engine's running batch.",
    "num_requests_waiting": "Requests accepted and not in the batch: queued at the front or in the engine.",
    "kv_cache_usage_perc": "Share of the KV pool's blocks that live requests hold, 0 to 1.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "num_preemptions": "How often a request lost its blocks.",
    "prompt_tokens": "Prompt tokens of requests that have their first token.",
    "prompt_tokens_cached": "Of them, those whose keys and values came from the prefix cache.",
    "generation_tokens": "Tokens generated.",
    "engine_restarts": "How often the engine process was started again.",
}
HISTOGRAMS = {
    "request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "request_generation_tokens": ("Tokens generated for a request.", TOKENS),
    "iteration_tokens_total": ("Tokens of a step: of prompts, and generated.", TOKENS),
    "request_params_n": ("Completions asked for in a call.", SMALL),
    "request_params_max_tokens": ("Most tokens that a request may generate.", TOKENS),
    "time_to_first_token_seconds": ("From a request's acceptance to its first token.", FIRST),
    "inter_token_latency_seconds": ("From a token to the next one.", TOKEN),
    "request_time_per_output_token_seconds": ("Seconds a token after the first, on average over a request.", TOKEN),
    "e2e_request_latency_seconds": ("From a request's acceptance to its end.", WHOLE),
    "request_queue_time_seconds": ("Until a request was first scheduled.", WHOLE),
    "request_inference_time_seconds": ("From there to its last token.", WHOLE),
    "request_prefill_time_seconds": ("From there to its first token.", WHOLE),
    "request_decode_time_seconds": ("From its first token to its last.", WHOLE),
}


class Metrics:
    """The metrics in a registry, by their names without the prefix.

    Attributes:
        gauges, counters, histograms: labelled with LABELS.
        finished: counter request_success, by finished_reason too.
        refused: counter request_refused, by model_name and reason.
        cache: gauge cache_config_info, always 1; its labels tell the KV pool's options.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        # Across processes only the living count; their requests add up, shares of a pool don't.
        modes: dict[str, Literal["livesum", "livemax"]] = dict.fromkeys(GAUGES, "livesum")
        modes["kv_cache_usage_perc"] = "livemax"
        self.gauges = {
            name: Gauge(PREFIX + name, text, LABELS, registry=registry, multiprocess_mode=modes[name])
            for name, text in GAUGES.items()
        }
        self.counters = {
            name: Counter(PREFIX + name, text, LABELS, registry=registry) for name, text in COUNTERS.items()
        }
        self.histograms = {
            name: Histogram(PREFIX + name, text, LABELS, registry=registry, buckets=bounds)
            for name, (text, bounds) in HISTOGRAMS.items()
        }
        self.finished = Counter(
            PREFIX + "request_success", "Requests that ended, by how.", (*LABELS, "finished_reason"), registry=registry
        )
        self.refused = Counter(
            PREFIX + "request_refused", "Requests turned away, by why.", ("model_name", "reason"), registry=registry
        )
        self.cache = Gauge(
            PREFIX + "cache_config_info",
            "The KV pool's options, as labels.",
            (*LABELS, "block_size", "num_gpu_blocks", "enable_prefix_caching"),
            registry=registry,
            multiprocess_mode="livemax",
        )


def sample_names() -> set[str]:
    """Every name under which a sample of these metrics is served."""
    registry = CollectorRegistry()
    Metrics(registry)
    suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]}
