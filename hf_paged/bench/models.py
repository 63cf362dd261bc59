"""The models that the benchmarks, the demo and `hf-paged generate` run on."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_paged.errors import ConfigError
from hf_paged.hf.load import load_model, load_tokenizer, random_model

LLAMA_8B = "random weights in Llama-3.1-8B's shape"
TINY_LLAMA = "a random Llama of four layers"


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


def load(name: str, device: str | None = None, dtype: str = "auto") -> Any:
    """A causal language model by name or path, in eval mode, on the device of that name.

    Without a device it goes where hf_paged.LLM would put it: on the GPUs where there are some, or else the CPU.

    Raises:
        ConfigError: it can't be found, or there is no such device; the message holds Transformers' own.
    """
    where = None if device is None else pick_device(device)
    try:
        if where is None:
            return load_model(name, dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(where).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} can't be loaded: {error}") from error


def load_or_8b(args: argparse.Namespace) -> tuple[Any, str]:
    """What --model, --device and --dtype name, or the random 8B model; and what to call it.

    Raises:
        ConfigError: see `load` and `llama_8b_shape`; or a dtype is asked for that the 8B model doesn't have.
    """
    if args.model:
        return load(args.model, args.device, args.dtype), args.model
    if args.dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"--dtype {args.dtype}: the random 8B model is in bfloat16; give a --model")
    return llama_8b_shape(pick_device(args.device)), LLAMA_8B


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ConfigError: there is none that can be loaded; the message holds Transformers' own.
    """
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} has no tokenizer that can be loaded: {error}") from error


def llama_8b_shape(device: torch.device) -> Any:
    """A random model of Llama-3.1-8B's shape in bf16, built on the device: weights normal (std 0.02), norms 1.

    Raises:
        ConfigError: the device is a CPU, which would take hours with it.
    """
    if device.type == "cpu":
        raise ConfigError("workload A without --model builds an 8B model (16 GB), which needs a GPU; give a --model")
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        initializer_range=0.02,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return random_model(config, device)


def tiny_llama(device: torch.device, dtype: str = "auto") -> Any:
    """A random model of four small layers, in float32 unless told otherwise."""
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        vocab_size=2048,
        max_position_embeddings=512,
        initializer_range=0.1,
        dtype="float32" if dtype == "auto" else dtype,
    )
    return random_model(config, device)
