"""What differs between releases of Transformers. No other module asks which release is installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import Cache, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

# The oldest and the newest release that the whole test suite runs on.
TESTED = ("5.17.0", "5.24.0")

_OUTPUT_FIELDS = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
# The cache's name in forwards, outputs and the keywords that `generate()` prepares; "past_key_values" before 5.24.
CACHE = "cache" if "cache" in _OUTPUT_FIELDS else "past_key_values"
# Every name under which a caller may hand a cache to `generate()`: a release takes old names beside its own.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
# The keywords for the model's forward that `generate()` prepares for a decoder-only model, whatever the call.
PREPARED_KWARGS = frozenset({"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE})


def release() -> str:
    """The release of Transformers that is installed."""
    return transformers.__version__


def is_newer_than_tested() -> bool:
    """Whether the installed release came out after the newest one that was tested."""
    return _numbers(release()) > _numbers(TESTED[-1])


def with_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword that hands a cache to a model's forward."""
    return {CACHE: cache}


def decoder_output(
    sequences: torch.Tensor,
    scores: tuple[torch.Tensor, ...] | None,
    logits: tuple[torch.Tensor, ...] | None,
    cache: Cache | None,
) -> GenerateDecoderOnlyOutput:
    """What `generate(return_dict_in_generate=True)` returns; see `GenerateDecoderOnlyOutput` for the fields."""
    return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits, **with_cache(cache))


def runs_in_step_with_other_processes(model: PreTrainedModel, synced_gpus: bool | None) -> bool:
    """Whether a call's forwards wait for those of other processes (DeepSpeed ZeRO-3, FSDP)."""
    mode = model._extract_generation_mode_kwargs(None, {}, synced_gpus, None, None)
    return bool(mode.get("synced_gpus"))


@contextmanager
def continuous_batching(model: PreTrainedModel, **options: Any) -> Iterator[Any]:
    """The manager of Transformers' own continuous batching: greedy, each output as long as asked for.

    Args:
        options: of ContinuousBatchingConfig.
    """
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    configs = {"generation_config": generation, "continuous_batching_config": ContinuousBatchingConfig(**options)}
    attention = model.config._attn_implementation
    try:
        with model.continuous_batching_context_manager(**configs) as manager:
            yield manager
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def continuous_batching_pool(manager: Any) -> tuple[int, Sequence[torch.Tensor]]:
    """Tokens of a page, and the KV tensors, of Transformers' own continuous batching."""
    config, cache = manager.continuous_batching_config, manager.batch_processor.cache
    page = getattr(config, "page_size", None) or config.block_size
    # One tensor from 5.23 on, one for each layer and kind before.
    return page, [cache.cache_tensor] if hasattr(cache, "cache_tensor") else [*cache.key_cache, *cache.value_cache]


def classes(module: ModuleType, names: Sequence[str]) -> frozenset[type]:
    """The classes of a module by name, those left out that this release doesn't have."""
    return frozenset(getattr(module, name) for name in names if hasattr(module, name))


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (5, 24, 0) of "5.24.0.dev0"."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def cache_of(output: Any) -> Cache | None:
    """The cache in what `generate()` or a forward returned."""
    return getattr(output, CACHE, None)
