"""The models that the benchmarks run on where none is named."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from hf_paged.errors import ConfigError
from hf_paged.hf.load import model_for, pick_device, random_llama

LLAMA_8B = "random weights in Llama-3.1-8B's shape"
TINY_LLAMA = "a random Llama of four layers"


def load_or_8b(args: argparse.Namespace) -> tuple[Any, str]:
    """What --model, --device and --dtype name, or the random 8B model; and what to call it.

    Raises:
        ConfigError: there is no such model or device; or a dtype is asked for that the 8B model doesn't have.
    """
    if args.model:
        return model_for(args.model, args.device, args.dtype), args.model
    if args.dtype not in ("auto", "bfloat16"):
        raise ConfigError(f"--dtype {args.dtype}: the random 8B model is in bfloat16; give a --model")
    return llama_8b_shape(pick_device(args.device)), LLAMA_8B


def vocabulary(model: Any) -> int:
    """Token ids that a model reads lie below it."""
    return model.get_input_embeddings().num_embeddings


def llama_8b_shape(device: torch.device) -> Any:
    """A random model of Llama-3.1-8B's shape in bf16, built on the device: weights normal (std 0.02), norms 1.

    Raises:
        ConfigError: the device is a CPU, which would take hours with it.
    """
    if device.type == "cpu":
        raise ConfigError("workload A without --model builds an 8B model (16 GB), which needs a GPU; give a --model")
    return random_llama(
        device,
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


def tiny_llama(device: torch.device, dtype: str = "auto") -> Any:
    """A random model of four small layers, in float32 unless told otherwise."""
    return random_llama(
        device,
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
