"""How much memory a step takes beside the weights and the KV pool."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_paged.config import PagedConfig
from hf_paged.engine.graphs import MIXED_PROMPTS, MIXED_TOKENS
from hf_paged.engine.pool import CHUNK

# How many tensors of a layer's widest and of the hidden size are alive at once in a forward, fused or not.
WIDE_TENSORS, HIDDEN_TENSORS = 4, 8
FLOAT = 4  # bytes; sampling takes logits as float32


def step_bytes(model: Any, config: PagedConfig) -> int:
    """An upper estimate of the bytes of a full step's activations, its logits, and what CUDA graphs keep."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    hidden, itemsize = embeddings.weight.shape[-1], embeddings.weight.element_size()
    inner = [m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    tokens = config.max_num_batched_tokens or CHUNK["cuda"]
    rows = config.max_num_seqs
    vocabulary = head.weight.shape[0] if head is not None else embeddings.weight.shape[0]
    # Sampling has the logits in float32 and as much again for what it makes of them.
    logits = vocabulary * rows * (itemsize + 3 * FLOAT)
    if not config.enforce_eager:  # they have memory of their own
        tokens += rows + MIXED_TOKENS[-1]
        logits += 2 * vocabulary * (rows + MIXED_PROMPTS) * itemsize
    return tokens * itemsize * (WIDE_TENSORS * max(inner, default=hidden) + HIDDEN_TENSORS * hidden) + logits
