"""A tiny random model with a byte-level tokenizer, as a directory that `hf-paged serve` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zoo

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens: three special ones, then every byte but the last three."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:253]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def save(folder: Path, family: str = "llama", **config: Any) -> Path:
    """Write a model and its tokenizer."""
    zoo.build(family, **config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
