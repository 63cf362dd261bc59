"""A real model: SmolLM2-135M-Instruct in fp32 answers a ragged workload with stock's tokens, row by row."""

from __future__ import annotations

from pathlib import Path

import torch
from stock import free, padded
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.bench import workloads

NEW_TOKENS = 64


def test_ragged_workload(smollm2_dir: Path) -> None:
    """32 prompts of 16 to 256 tokens at once, against stock's left-padded batches of 8."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    prompts = sorted((item.prompt_token_ids for item in workloads.cpu().items), key=len)  # little padding in a batch
    expected: list[list[int]] = []
    for first in range(0, len(prompts), 8):
        batch = padded(prompts[first : first + 8], pad=model.config.eos_token_id)
        output = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        tails = output[:, batch["input_ids"].shape[1] :]
        expected += torch.nn.functional.pad(tails, (0, NEW_TOKENS - tails.shape[1]), value=-1).tolist()
    batch = padded(prompts, pad=model.config.eos_token_id)
    handle = hf_paged.patch(model, on_unsupported="error")
    output = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert handle.stats.waste < 0.2
    assert free(handle.stats)
    hf_paged.unpatch(model)
    eos = model.generation_config.eos_token_id
    ends = set(eos) if isinstance(eos, list) else {eos}
    got = output[:, batch["input_ids"].shape[1] :].tolist()
    wrong = [
        i for i, (one, other) in enumerate(zip(got, expected, strict=True)) if until(one, ends) != until(other, ends)
    ]
    assert not wrong


def until(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first that ends a row."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]
