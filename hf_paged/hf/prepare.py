"""generate()'s arguments -> what the engine needs, or the reason why stock `generate()` has to answer.

Transformers does the parsing: `generate(custom_generate=…)` is its own extension point, and hands over expanded inputs,
processors, criteria and the prepared generation config.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria, StopStringCriteria

STOCK_GENERATE = GenerationMixin.generate
_SIGNATURE = inspect.signature(STOCK_GENERATE)

# What the preparation adds by itself; anything else was given for the model's forward.
_OWN_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
}
# These hold keys and values as exactly as the pool does; the others (quantised, offloaded) were asked for on purpose.
_PLAIN_CACHES = {None, "dynamic", "dynamic_full", "static", "hybrid", "sliding_window", "hybrid_chunked"}
_CARRIED_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}


class Unsupported(Exception):
    """The call can't be carried; the message says why."""


@dataclasses.dataclass
class Prepared:
    """A call, ready for the engine.

    Attributes:
        input_ids: int64 [rows, width], padded on the left, each prompt repeated `num_return_sequences` times.
        prompts: the rows without padding.
        copies: how often each prompt stands in `input_ids`, in a row.
        processors, criteria: as Transformers built them, the user's own among them.
        config: the prepared generation config.
        streamer: the user's streamer, or None.
    """

    input_ids: torch.Tensor
    prompts: list[list[int]]
    copies: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any

    @property
    def max_new_tokens(self) -> int:
        """Most new tokens of a row; stock draws one at least."""
        lengths = [criterion.max_length for criterion in self.criteria if isinstance(criterion, MaxLengthCriteria)]
        return max(1, min(lengths) - self.input_ids.shape[1])

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a row: those of the criteria, for a caller's own goes before the config's."""
        criteria = [criterion for criterion in self.criteria if isinstance(criterion, EosTokenCriteria)]
        return frozenset(token for criterion in criteria for token in criterion.eos_token_id.flatten().tolist())


def prepare(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prepared:
    """Have Transformers prepare a call.

    Raises:
        Unsupported: the engine can't carry it.
        whatever stock `generate()` raises for these arguments.
    """
    bound = _SIGNATURE.bind(model, *args, **kwargs)
    given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    given.pop("kwargs", None)
    given.pop("self")
    _check_arguments(model, given)
    given.pop("labels", None)  # Seq2SeqTrainer passes them on; stock takes them out before each forward
    streamer, tokenizer = given.pop("streamer", None), given.pop("tokenizer", None)
    criteria = _stop_strings(model, given, tokenizer)
    seen: list[Prepared] = []

    def capture(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> None:
        _check_prepared(generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        seen.append(
            Prepared(
                input_ids=input_ids,
                prompts=_rows(input_ids, mask),
                copies=generation_config.num_return_sequences or 1,
                processors=logits_processor,
                criteria=StoppingCriteriaList([*stopping_criteria, *criteria]),
                config=generation_config,
                streamer=streamer,
            )
        )

    STOCK_GENERATE(model, custom_generate=capture, **given)
    return seen[0]


def _check_arguments(model: PreTrainedModel, given: dict[str, Any]) -> None:
    """What can be told before Transformers spends time on it."""
    reasons = {
        "assistant_model": "assisted decoding",
        "custom_generate": "custom_generate",
        "negative_prompt_ids": "classifier-free guidance",
        "inputs_embeds": "inputs_embeds",
        "past_key_values": "a cache of the caller's own (past_key_values)",
        "position_ids": "position_ids of the caller's own",
    }
    for name, reason in reasons.items():
        if given.get(name) is not None and given[name] is not False:
            raise Unsupported(f"{reason} is not carried on the engine yet")
    if model._extract_generation_mode_kwargs(None, {}, given.get("synced_gpus"), None, None).get("synced_gpus"):
        raise Unsupported(
            "synced_gpus (DeepSpeed ZeRO-3, FSDP: processes that forward in step) is not carried on the engine"
        )
    if given.get("inputs") is None and given.get("input_ids") is None:
        raise Unsupported("generation from the BOS token alone is not carried on the engine yet")
    if (cache := _setting(model, given, "cache_implementation")) not in _PLAIN_CACHES:
        raise Unsupported(f"cache_implementation={cache!r} asks for another cache")
    if _setting(model, given, "token_healing"):
        raise Unsupported("token_healing is not carried on the engine yet")
    if "prepare_inputs_for_generation" in vars(model):
        raise Unsupported("somebody replaced its prepare_inputs_for_generation (PEFT's prompt tuning does)")
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    if any(isinstance(hook, functools.partial) and "adapter_names" in hook.keywords for hook in hooks):
        raise Unsupported("adapter_names (a LoRA adapter for each row) is not carried on the engine yet")


def _setting(model: PreTrainedModel, given: dict[str, Any], name: str) -> Any:
    """What an option of the generation config comes to: given by name, in the config given, or in the model's own."""
    sources = (
        given.get(name),
        getattr(given.get("generation_config"), name, None),
        getattr(model.generation_config, name, None),
    )
    return next((value for value in sources if value is not None), None)


def _check_prepared(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """What only the prepared call tells."""
    mode = config.get_generation_mode()
    if mode not in _CARRIED_MODES:
        raise Unsupported(f"{mode.value.replace('_', ' ')} is not carried on the engine yet")
    if config.cache_implementation not in _PLAIN_CACHES:
        raise Unsupported(f"cache_implementation={config.cache_implementation!r} asks for another cache")
    if config.output_attentions or config.output_hidden_states:
        raise Unsupported("output_attentions and output_hidden_states are not carried on the engine")
    if extra := sorted(name for name in set(model_kwargs) - _OWN_MODEL_KWARGS if model_kwargs[name] is not None):
        raise Unsupported(f"{', '.join(extra)} for the model's forward is not carried on the engine yet")


def _stop_strings(model: PreTrainedModel, given: dict[str, Any], tokenizer: Any) -> list[StopStringCriteria]:
    """Stop strings as a criterion of ours: the tokenizer they need doesn't pass through `custom_generate`."""
    strings = _setting(model, given, "stop_strings")
    if strings is None or tokenizer is None:
        return []  # without a tokenizer Transformers raises by itself
    given["stop_strings"] = None
    return [StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)]


def _rows(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    if mask is None or input_ids.shape[1] == 0:
        return input_ids.tolist()
    kept = mask.bool()
    if bool((kept[:, 1:] < kept[:, :-1]).any()) or not bool(kept[:, -1].all()):
        raise Unsupported(
            "an attention mask with zeros after ones (right padding: use padding_side='left') is not carried on "
            "the engine"
        )
    return [row[keep].tolist() for row, keep in zip(input_ids, kept, strict=True)]
