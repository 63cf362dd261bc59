"""generate()'s arguments -> what the engine needs, or the reason why stock `generate()` has to answer.

Transformers does the parsing: `generate(custom_generate=…)` is its own extension point, and hands over expanded inputs,
processors, criteria and the prepared generation config.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria, StopStringCriteria

from hf_paged.errors import HFPagedError
from hf_paged.hf import compat

STOCK_GENERATE = GenerationMixin.generate
_SIGNATURE = inspect.signature(STOCK_GENERATE)

# These hold keys and values as exactly as the pool does; the others (quantised, offloaded) were asked for on purpose.
_DYNAMIC_CACHES = {None, "dynamic", "dynamic_full"}
_STATIC_CACHES = {"static", "hybrid", "sliding_window", "hybrid_chunked"}
# Keywords of `generate()` that its signature doesn't name; `labels` come from a trainer, and stock takes them out.
_OF_GENERATE = {"input_ids", "labels", "tokenizer", "assistant_tokenizer", "trust_remote_code"}
_ANY_CONFIG = GenerationConfig()
_CARRIED_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}


class Unsupported(HFPagedError):
    """The call can't be carried; the message says why."""


class SeamBroken(Unsupported):
    """Transformers prepared the call in a way that is not known here."""


@dataclasses.dataclass
class Prepared:
    """A call, ready for the engine.

    Attributes:
        input_ids: int64 [rows, width], padded, each prompt repeated `num_return_sequences` times.
        prompts: the rows without the tokens that the attention mask hides.
        visible: bool [rows, width], the tokens that the mask shows; on the CPU.
        copies: how often each prompt stands in `input_ids`, in a row.
        processors, criteria: as Transformers built them, the user's own among them.
        config: the prepared generation config.
        streamer: the user's streamer, or None.
        seen: whether code of the caller's (a streamer, a processor) has seen a part of the answer.
    """

    input_ids: torch.Tensor
    prompts: list[list[int]]
    visible: torch.Tensor
    copies: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any
    seen: bool = False

    @property
    def max_new_tokens(self) -> int:
        """Most new tokens of a row; stock draws one at least."""
        lengths = [criterion.max_length for criterion in self.criteria if isinstance(criterion, MaxLengthCriteria)]
        return max(1, min(lengths) - self.input_ids.shape[1])

    @property
    def has_gaps(self) -> bool:
        """Whether a row hides tokens between others that it shows."""
        return bool((self.visible[:, 1:] < self.visible[:, :-1]).any())

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a row: those of the criteria, for a caller's own goes before the config's."""
        criteria = [criterion for criterion in self.criteria if isinstance(criterion, EosTokenCriteria)]
        return frozenset(token for criterion in criteria for token in criterion.eos_token_id.flatten().tolist())


@dataclasses.dataclass
class HandedOver:
    """What Transformers hands over to a decoding loop, and what doesn't pass through it.

    Attributes:
        model_kwargs: what is meant for the model's forward.
        streamer, own_criteria: kept back from Transformers: the streamer, and stop strings as a criterion.
    """

    input_ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    streamer: Any = None
    own_criteria: Sequence[StopStringCriteria] = ()


def bind(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of `**kwargs` among them.

    Raises:
        TypeError: they don't fit `generate()`'s signature.
    """
    bound = _SIGNATURE.bind(model, *args, **kwargs)
    given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    given.pop("kwargs", None)
    given.pop("self")
    return given


def check(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Refuse what can be told from the arguments, before the model is looked at and Transformers spends time.

    Args:
        given: the call's arguments by name; see `bind`.

    Raises:
        Unsupported: one of them can't be carried.
    """
    _check_named(given)
    _check_tensors(given)
    _check_settings(model, given)
    _check_model(model, given)


def hand_over(model: PreTrainedModel, given: Mapping[str, Any]) -> HandedOver:
    """Have Transformers prepare a call.

    Raises:
        SeamBroken: it doesn't hand the call over.
        whatever stock `generate()` raises for these arguments.
    """
    passed = dict(given)
    passed.pop("labels", None)  # Seq2SeqTrainer passes them on; stock takes them out before each forward
    streamer, tokenizer = passed.pop("streamer", None), passed.pop("tokenizer", None)
    own_criteria = _stop_strings(model, passed, tokenizer)
    found: list[HandedOver] = []

    def capture(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> None:
        found.append(HandedOver(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs))

    with torch.no_grad():
        STOCK_GENERATE(model, custom_generate=capture, **passed)
    if not found:
        raise SeamBroken("generate(custom_generate=…) doesn't hand the call over")
    return dataclasses.replace(found[0], streamer=streamer, own_criteria=own_criteria)


def read(handed: HandedOver, given: Mapping[str, Any]) -> Prepared:
    """Check a prepared call and turn it into engine input.

    Args:
        given: the call's arguments by name: what else is meant for the forward was added by the preparation.

    Raises:
        Unsupported: the engine can't carry it.
    """
    config, kwargs = handed.config, handed.model_kwargs
    _check_mode(config)
    _check_forward(kwargs, given)
    visible = _visible(handed.input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    return Prepared(
        input_ids=handed.input_ids,
        prompts=[row[keep].tolist() for row, keep in zip(handed.input_ids.cpu(), visible, strict=True)],
        visible=visible,
        copies=config.num_return_sequences or 1,
        processors=handed.processors,
        criteria=StoppingCriteriaList([*handed.criteria, *handed.own_criteria]),
        config=config,
        streamer=handed.streamer,
    )


# ------------------------------------------------------------------------- what is told before Transformers spends time


def _check_named(given: Mapping[str, Any]) -> None:
    """Arguments that stock alone can honour."""
    reasons = {
        "assistant_model": "assisted decoding",
        "custom_generate": "custom_generate",
        "negative_prompt_ids": "classifier-free guidance",
        "inputs_embeds": "inputs_embeds",
        "position_ids": "position_ids of the caller's own",
        "cache_position": "cache_position of the caller's own",
        **{name: f"a cache of the caller's own ({name})" for name in compat.CACHE_ARGUMENTS},
    }
    for name, reason in reasons.items():
        if given.get(name) is not None and given[name] is not False:
            raise Unsupported(f"{reason} is not carried on the engine yet")


def _check_tensors(given: Mapping[str, Any]) -> None:
    """Ids and mask have to be of one shape; what stock makes of others is its own."""
    ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    if ids is None:
        raise Unsupported("generation from the BOS token alone is not carried on the engine yet")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise Unsupported(f"input_ids are no integers of shape [rows, tokens], but {_described(ids)}")
    if len(ids) == 0:
        raise Unsupported("input_ids have no rows")
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        raise Unsupported(f"the attention_mask is {_described(mask)} where input_ids are {_described(ids)}")


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


def _check_settings(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Options of the generation config that stock alone can honour."""
    cache = _setting(model, given, "cache_implementation")
    if cache not in _DYNAMIC_CACHES | _STATIC_CACHES:
        raise Unsupported(f"cache_implementation={cache!r} asks for another cache")
    returned = _setting(model, given, "return_dict_in_generate") and _setting(model, given, "use_cache") is not False
    if cache in _STATIC_CACHES and returned:
        raise Unsupported(f"cache_implementation={cache!r} with return_dict_in_generate asks for that cache back")
    if _setting(model, given, "compile_config") is not None:
        raise Unsupported("compile_config asks for a compiled forward")
    if _setting(model, given, "token_healing"):
        raise Unsupported("token_healing is not carried on the engine yet")


def _check_model(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """What was done to the model for this call."""
    if compat.runs_in_step_with_other_processes(model, given.get("synced_gpus")):
        raise Unsupported(
            "synced_gpus (DeepSpeed ZeRO-3, FSDP: processes that forward in step) is not carried on the engine"
        )
    if _get_current_dispatch_mode() is not None or _in_function_mode():
        raise Unsupported(
            "a torch mode (FlopCounterMode, FakeTensorMode, function modes) sees the caller's thread only"
        )
    if "prepare_inputs_for_generation" in vars(model):
        raise Unsupported("somebody replaced its prepare_inputs_for_generation (PEFT's prompt tuning does)")
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    if any(isinstance(hook, functools.partial) and "adapter_names" in hook.keywords for hook in hooks):
        raise Unsupported("adapter_names (a LoRA adapter for each row) is not carried on the engine yet")


def _in_function_mode() -> bool:
    """Whether a function mode is on, other than those of `torch.set_default_device` and `with device:`."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _setting(model: PreTrainedModel, given: Mapping[str, Any], name: str) -> Any:
    """What an option of the generation config comes to: given by name, in the config given, or in the model's own."""
    sources = (
        given.get(name),
        getattr(given.get("generation_config"), name, None),
        getattr(model.generation_config, name, None),
    )
    return next((value for value in sources if value is not None), None)


def _stop_strings(model: PreTrainedModel, given: dict[str, Any], tokenizer: Any) -> list[StopStringCriteria]:
    """Stop strings as a criterion of ours: the tokenizer they need doesn't pass through `custom_generate`."""
    strings = _setting(model, given, "stop_strings")
    if strings is None or tokenizer is None:
        return []  # without a tokenizer Transformers raises by itself
    given["stop_strings"] = None
    return [StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)]


# ------------------------------------------------------------------------------------ what only the prepared call tells


def _check_forward(model_kwargs: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """What is meant for the model's forward beside ids, mask and positions.

    The caller's own inputs come first: the preparation may have made others of them, such as encoded images.
    """
    if callers := sorted(name for name in given if _is_for_the_forward(name) and _says_something(given[name])):
        raise Unsupported(f"{', '.join(callers)} for the model's forward is not carried on the engine yet")
    left = set(model_kwargs) - compat.PREPARED_KWARGS
    if added := sorted(name for name in left if _says_something(model_kwargs[name])):
        raise SeamBroken(f"the preparation adds {', '.join(added)} for the model's forward, which is not known here")


def _check_mode(config: GenerationConfig) -> None:
    """Refuse decoding modes and extra outputs that the engine doesn't support."""
    mode = config.get_generation_mode()
    if mode not in _CARRIED_MODES:
        raise Unsupported(f"{mode.value.replace('_', ' ')} is not carried on the engine yet")
    if config.output_attentions or config.output_hidden_states:
        raise Unsupported("output_attentions and output_hidden_states are not carried on the engine")


def _is_for_the_forward(name: str) -> bool:
    """Whether an argument of a call is neither `generate()`'s own nor an option of the generation config."""
    known = name in _SIGNATURE.parameters or name in _OF_GENERATE or name in compat.PREPARED_KWARGS
    return not known and not hasattr(_ANY_CONFIG, name)


def _says_something(value: Any) -> bool:
    """Whether a keyword can change the forward: None and an empty mapping (of encoder outputs, say) can't."""
    return value is not None and not (isinstance(value, Mapping) and not value)


def _visible(input_ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Which tokens the mask shows, bool [rows, width], on the CPU.

    Args:
        input_ids: int64 [rows, width].
        mask, position_ids: as they were prepared: [rows, width] or None; positions may have more dimensions in front.

    Raises:
        Unsupported: the mask hides a row's last token, or holds other numbers than 0 and 1.
        SeamBroken: the positions don't count the tokens that the mask shows.
    """
    visible = torch.ones(input_ids.shape, dtype=torch.bool)
    if mask is not None:
        visible = _shown_by(mask.cpu(), input_ids)
    if position_ids is not None:
        _check_positions(position_ids.cpu(), visible)
    if not bool(visible[:, -1:].all()):
        raise Unsupported(
            "an attention mask that hides the last token of a row (right padding: use padding_side='left') is not "
            "carried on the engine"
        )
    return visible


def _shown_by(mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    if mask.shape != input_ids.shape:
        raise SeamBroken(f"the prepared attention_mask is {_described(mask)} where ids are {_described(input_ids)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise Unsupported("an attention_mask with other values than 0 and 1 is not carried on the engine")
    return mask.bool()


def _check_positions(position_ids: torch.Tensor, visible: torch.Tensor) -> None:
    """The engine gives each token that is shown the next position; the call has to mean the same."""
    counted = (visible.long().cumsum(-1) - 1).clamp(min=0)
    rows, width = visible.shape
    fits = position_ids.dim() >= 2 and position_ids.shape[-1] == width and position_ids.shape[-2] in (1, rows)
    if not fits or not bool(((position_ids == counted) | ~visible).all()):
        raise SeamBroken("the preparation gives the tokens other positions than the mask counts")
