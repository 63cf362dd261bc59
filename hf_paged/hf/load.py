"""Names and paths -> a loaded model and its tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_paged.errors import ConfigError


def load_model(
    name: str, *, dtype: Any = "auto", revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from the hub or a directory, in eval mode, on the current GPU where there is one.

    The weights go to it one by one, through accelerate, so that they are never held twice. A model that is spread over
    several devices can't be carried, so none is spread here.
    """
    where = {"device_map": {"": torch.cuda.current_device()}} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, **where
    )
    return model.eval()


def random_model(
    config: Any, device: torch.device, dtype: Any = "auto", *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model of a config's shape with the random weights that it begins a training with.

    It is made on the device: on a CPU the drawing of an 8B model's weights takes minutes.

    Raises:
        ConfigError: the config is of quantised weights, which can't be drawn.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError("random weights can't be had of a config with a quantization_config; load the checkpoint")
    wanted = config.dtype or torch.get_default_dtype() if dtype == "auto" else dtype
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code).eval()


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model."""
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
