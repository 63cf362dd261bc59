"""The names of `batch`, `request` and `stats`, where this module was one with them. Kept for one release."""

from hf_paged.batch import NULL_BLOCK, Batch, CacheSpec, LayerSpec, Layout, Scheduled, Step
from hf_paged.request import (
    CompletionOutput,
    Constraint,
    FinishReason,
    Logprob,
    Reject,
    Request,
    RequestMetrics,
    RequestOutput,
    Sampled,
    Status,
    TokenSampler,
)
from hf_paged.stats import CacheStats, EngineInfo, StepStats

__all__ = [
    "NULL_BLOCK",
    "Batch",
    "CacheSpec",
    "CacheStats",
    "CompletionOutput",
    "Constraint",
    "EngineInfo",
    "FinishReason",
    "LayerSpec",
    "Layout",
    "Logprob",
    "Reject",
    "Request",
    "RequestMetrics",
    "RequestOutput",
    "Sampled",
    "Scheduled",
    "Status",
    "Step",
    "StepStats",
    "TokenSampler",
]
