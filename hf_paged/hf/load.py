"""Models and tokenizers by name, devices by name, and models of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from hf_paged.errors import ConfigError


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one, the first GPU, or else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    found = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(found)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {found!r}; cpu and cuda are common") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {found!r}: torch {torch.__version__} sees no CUDA device here; use cpu")
    return device


def load_model(
    name: str,
    *,
    device: torch.device | None = None,
    dtype: Any = "auto",
    random: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model from the hub or a directory, in eval mode.

    A GPU gets the weights one by one, through accelerate, so that they are never held twice. A model that is spread
    over several devices can't be carried, so none is spread here.

    Args:
        device: where it goes; None: the current GPU, or the CPU where there is none.
        random: draw the weights instead of loading them; see `random_model`.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    if random:
        config = AutoConfig.from_pretrained(name, **source)
        return random_model(config, device, dtype, trust_remote_code=trust_remote_code)
    where = {"device_map": {"": device.index}} if device.type == "cuda" else {}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **source, **where)
    return (model if model.device == device else model.to(device)).eval()


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model."""
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def model_for(name: str, device: str | None = None, dtype: str = "auto") -> Any:
    """`load_model` for a command line.

    Raises:
        ConfigError: it can't be loaded, or there is no such device; the message holds Transformers' own.
    """
    where = None if device is None else pick_device(device)
    try:
        return load_model(name, device=where, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} can't be loaded: {error}") from error


def tokenizer_for(name: str) -> Any:
    """`load_tokenizer` for a command line.

    Raises:
        ConfigError: there is none that can be loaded; the message holds Transformers' own.
    """
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} has no tokenizer that can be loaded: {error}") from error


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


def random_llama(device: torch.device, **shape: Any) -> PreTrainedModel:
    """A Llama of random weights; `shape` are the fields of LlamaConfig."""
    return random_model(LlamaConfig(**shape), device)


def convert_gguf(gguf: Path, folder: Path, end: str) -> None:
    """Write a GGUF file's model and tokenizer as a directory in fp32 that `from_pretrained` loads.

    Args:
        end: the token that ends each turn of a chat.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain fp32 now; what says otherwise would make from_pretrained look for GGUF again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    tokenizer.eos_token = tokenizer.pad_token = end
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.convert_tokens_to_ids(end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def hide_progress() -> None:
    """Have Transformers show no progress bars."""
    disable_progress_bar()
