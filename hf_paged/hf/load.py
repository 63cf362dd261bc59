"""Names and paths -> a loaded model and its tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str, *, dtype: Any = "auto", revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from the hub or a directory, in eval mode, on the GPU where there is one.

    A model that one GPU can't hold is spread over those there are by accelerate (`device_map="auto"`).
    """
    where = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, **where
    )
    return model.eval()


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model."""
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
