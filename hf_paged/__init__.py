"""hf_paged: existing Hugging Face Transformers code, as fast as a serving engine, without leaving Transformers."""

from hf_paged._version import __version__
from hf_paged.config import PagedConfig
from hf_paged.engine.scheduler import FCFSScheduler
from hf_paged.errors import (
    ConfigError,
    EngineClosedError,
    HFPagedError,
    InvalidRequestError,
    PluginError,
    RequestAbortedError,
    RequestFailedError,
    RequestRejectedError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from hf_paged.hf.explain import explain
from hf_paged.hf.paged_cache import PagedCache
from hf_paged.hf.patch import PatchedModel, paged, patch, unpatch
from hf_paged.hookspecs import hookimpl
from hf_paged.llm import LLM
from hf_paged.params import SamplingParams, StructuredOutputs
from hf_paged.request import CompletionOutput, Logprob, Reject, RequestOutput

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineClosedError",
    "FCFSScheduler",
    "HFPagedError",
    "InvalidRequestError",
    "Logprob",
    "PagedCache",
    "PagedConfig",
    "PatchedModel",
    "PluginError",
    "Reject",
    "RequestAbortedError",
    "RequestFailedError",
    "RequestOutput",
    "RequestRejectedError",
    "SamplingParams",
    "StructuredOutputs",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "__version__",
    "explain",
    "hookimpl",
    "paged",
    "patch",
    "unpatch",
]
