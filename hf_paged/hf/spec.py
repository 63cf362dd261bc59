"""What a model is: its attention layers, seen in one forward, or the reason why it can't be carried."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_paged.batch import CacheSpec, LayerSpec
from hf_paged.errors import UnsupportedModelError, first_line
from hf_paged.hf.attention import PagedStep, SeenLayer
from hf_paged.hf.eager import eager
from hf_paged.hf.model import FlatModel, flat_forward
from hf_paged.hf.weights import modules_of

CARRIED_LAYERS = {"full_attention", "sliding_attention"}
# Their rotary frequencies depend on the longest row of a batch, so what a row's keys are depends on its neighbours.
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class _Look(PagedStep):
    """Notes each attention call, and gives zeros.

    Masks that the model asks for are handed out as tensors whose storage tells them apart: the window of a layer is
    that of the mask which reaches it, whatever its keyword arguments say.
    """

    def __init__(self, device: torch.device) -> None:
        self.fusion = None  # modules are looked at as they are
        self.position = 0
        self.layers: list[SeenLayer] = []
        self.num_logits = 0
        self._device = device
        self._masks: list[tuple[torch.Tensor, Callable[..., Any]]] = []

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if query.shape[2] != key.shape[2] or query.shape[0] != 1:
            raise UnsupportedModelError(
                f"an attention layer has queries {tuple(query.shape)} but keys {tuple(key.shape)}: "
                "they are not one sequence's own"
            )
        if key.device != self._device:
            raise UnsupportedModelError(
                f"its layers lie on several devices, {self._device} and {key.device} among them"
            )
        if mask is not None:
            window = _window_of(self._function_of(mask))
        spec = LayerSpec(query.shape[1], key.shape[1], query.shape[3], value.shape[3], window)
        self.layers.append(SeenLayer(module, spec, _kept_dtype(key), scale, softcap, sinks))
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def mask(self, mask_function: Callable[..., Any], num_tokens: int) -> torch.Tensor | None:
        mask = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=self._device)
        self._masks.append((mask, mask_function))
        return mask

    def _function_of(self, mask: torch.Tensor) -> Callable[..., Any]:
        for known, function in self._masks:
            if known.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr():
                return function
        raise UnsupportedModelError("it changes the attention mask before its layers use it")


def flat_model(model: nn.Module) -> FlatModel:
    """The model on the flat path. It is in eval mode, or has no dropout.

    Raises:
        UnsupportedModelError: it can't be carried; the message says why.
    """
    carried = _check_class(model)
    check_mode(carried)
    _check_weights(carried)
    configs = attention_configs(carried)
    config = carried.config.get_text_config(decoder=True)
    _check_config(config)
    look = _look_at(carried, configs)
    if not look.layers:
        raise UnsupportedModelError(f"no layer of {type(model).__name__} asks Transformers' attention interface")
    device = carried.get_input_embeddings().weight.device
    spec = CacheSpec(tuple(layer.spec for layer in look.layers), look.layers[0].dtype, device)
    positions = getattr(config, "max_position_embeddings", None)
    return FlatModel(carried, spec, look.layers, configs, look.num_logits, positions)


def unwrap(model: Any) -> Any:
    """The Transformers model inside PEFT, DDP, FSDP, torch.compile and Accelerate wrappers, a pipeline or a trainer.

    Raises:
        UnsupportedModelError: there is none.
    """
    given, seen = model, []
    while not isinstance(model, PreTrainedModel):
        seen.append(model)
        model = _inside(model)
        if model is None or any(model is one for one in seen):
            raise UnsupportedModelError(
                "hf_paged takes a Transformers model, a PEFT, DDP or Accelerate wrapper of one, or what has one as "
                f"`model`, such as a pipeline or a trainer; got {type(given).__name__}"
            )
    return model


def _inside(wrapper: Any) -> Any:
    """What a wrapper is around, or None."""
    if isinstance(wrapper, type):
        return None
    if callable(inner := getattr(wrapper, "get_base_model", None)):  # PEFT
        return inner()
    # A pipeline and a trainer are no modules; both have the module that they use as `model`.
    names = ("module", "_orig_mod") if isinstance(wrapper, nn.Module) else ("model",)
    return next((part for name in names if (part := getattr(wrapper, name, None)) is not None), None)


def check_mode(model: PreTrainedModel) -> None:
    """Refuse a model whose forward is random: in training mode, with a layer that drops, or a config which says so.

    Raises:
        UnsupportedModelError: it is.
    """
    if not any(module.training for module in model.modules()):
        return
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    rates = [rate for c in configs for name, rate in vars(c).items() if "drop" in name or "jitter" in name]
    rates += [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    if any(isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0 for rate in rates):
        raise UnsupportedModelError("the model is in training mode, with dropout; call model.eval() first")


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configs, each once, that name the attention of the model or of a part of it."""
    found = {
        id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------- the checks


def _check_class(model: Any) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} is not a Transformers model that generates")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError("it is an encoder-decoder")
    for name in ("prepare_inputs_for_generation", "_sample"):
        if not getattr(type(model), name).__module__.startswith("transformers."):
            raise UnsupportedModelError(f"{type(model).__name__} has a {name}() of its own")
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise UnsupportedModelError("its forward takes no position_ids, so rows can't share a flat batch")
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError("its layers keep a recurrent state")
    if not (model._supports_attention_backend or model._can_set_attn_implementation()):
        raise UnsupportedModelError("its layers don't use Transformers' attention interface")
    return model


def _check_weights(model: PreTrainedModel) -> None:
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise UnsupportedModelError("some of its weights are offloaded or not loaded: they lie on the device 'meta'")


def _check_config(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - CARRIED_LAYERS
    if kinds:
        raise UnsupportedModelError(f"it has layers of the kind {', '.join(sorted(kinds))}")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {value for value in _leaves(rope, "rope_type") if value in BATCH_DEPENDENT_ROPE}
    if kinds:
        raise UnsupportedModelError(
            f"its rotary embedding is {kinds.pop()!r}: it depends on the longest row of a batch"
        )


def _leaves(mapping: dict[str, Any], key: str) -> list[Any]:
    found = [mapping[key]] if key in mapping else []
    return found + [x for value in mapping.values() if isinstance(value, dict) for x in _leaves(value, key)]


def _look_at(model: PreTrainedModel, configs: Sequence[Any]) -> _Look:
    """One forward over four tokens that only notes what the attention layers are given."""
    tokens = torch.arange(4, device=model.get_input_embeddings().weight.device)
    look = _Look(tokens.device)
    try:
        with torch.no_grad(), eager(modules_of(model)).on():
            keeps = model._supports_logits_to_keep()
            logits = flat_forward(model, tokens, tokens, tokens[-1:], look, configs, keeps_logits=keeps)
        look.num_logits = logits.shape[-1]
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"a forward over a flat batch fails: {type(error).__name__}: {first_line(error)}"
        ) from error
    return look


_FAR = 140_000  # a position beyond every window


def _window_of(mask: Callable[..., Any]) -> int | None:
    """The window that a mask function describes.

    Raises:
        UnsupportedModelError: it is neither causal nor a causal window.
    """

    def sees(query: int, key: int) -> bool:
        zero = torch.tensor(0)
        return bool(mask(zero, zero, torch.tensor(query), torch.tensor(key)))

    try:
        first, last = 0, _FAR  # the first key that a far query sees, by bisection
        while first < last:
            middle = (first + last) // 2
            first, last = (first, middle) if sees(_FAR, middle) else (middle + 1, last)
        window = None if first == 0 else _FAR - first + 1
        for query in (0, 1, 3, 70, 5_000, _FAR):
            edges = {0, 1, query, query + 1, query // 2, *((query - window, query - window + 1) if window else ())}
            for key in (k for k in edges if k >= 0):
                if sees(query, key) != (key <= query and (window is None or query - key < window)):
                    raise UnsupportedModelError("its attention mask is neither causal nor a sliding window's")
    except IndexError as error:  # it looks tokens up, of which there are four here
        raise UnsupportedModelError("its attention mask depends on the tokens") from error
    return window


def _kept_dtype(key: torch.Tensor) -> torch.dtype:
    """What keys and values are kept in: what autocast makes of attention, else what the layer gives.

    Autocast may be the caller's, or inside the model's own forward, as Accelerate has it.
    """
    device = key.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key.dtype
