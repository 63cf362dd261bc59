"""A real model: SmolLM2-135M-Instruct in fp32 answers a ragged workload with stock's tokens, row by row."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from stock import free, padded
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_paged
from hf_paged.bench import workloads

pytestmark = pytest.mark.slow

# The issue's own size; `HF_PAGED_FULL=1 pytest tests/hf/test_smollm2.py` runs it.
NEW_TOKENS = 64 if os.environ.get("HF_PAGED_FULL") == "1" else 32


def test_ragged_workload(smollm2_dir: Path) -> None:
    """32 prompts of 16 to 256 tokens at once, against stock's left-padded batches of 8."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # no row ends early: every token of every row is compared
    prompts = sorted((item.prompt_token_ids for item in workloads.cpu().items), key=len)  # little padding in a batch
    expected: list[list[int]] = []
    for first in range(0, len(prompts), 8):
        expected += answers(model, prompts[first : first + 8])
    assert [len(row) for row in expected] == [NEW_TOKENS] * 32

    handle = hf_paged.patch(model, on_unsupported="error")
    got = answers(model, prompts)
    assert [i for i in range(32) if got[i] != expected[i]] == []
    assert handle.stats.waste < 0.2
    assert handle.stats.num_preemptions == 0
    assert free(handle.stats)
    hf_paged.unpatch(model)

    # Half the blocks that these rows need, and prompts cut in pieces; then prompts that begin with known ones.
    tight = {"num_blocks": 45, "max_num_batched_tokens": 50}
    few = range(8, 16)
    with hf_paged.paged(model, on_unsupported="error", **tight) as handle:
        got = answers(model, [prompts[i] for i in few], 24)
        assert got == [expected[i][:24] for i in few]
        assert handle.stats.num_preemptions > 0
        hits = handle.stats.prefix_hits
        for _ in range(2):
            got = answers(model, prompts[12:14], 4)
        assert got == [row[:4] for row in expected[12:14]]
        assert handle.stats.prefix_hits - hits >= sum(len(prompt) - 16 for prompt in prompts[12:14])
        assert free(handle.stats)


def answers(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """The new tokens of each prompt, from one greedy call."""
    batch = padded(prompts, pad=model.config.pad_token_id)
    output = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    return output[:, batch["input_ids"].shape[1] :].tolist()
