"""Generate with an installed hf_paged, away from any checkout: a tiny random model, patched and not, has to agree."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_paged


def main() -> None:
    checkout = Path(__file__).resolve().parent.parent
    for name in ("hf_paged", "hf_paged_kernels", "hf_paged_sdpa", "hf_paged_triton"):
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed"
        assert spec.origin is not None
        assert "site-packages" in spec.origin, f"{name} comes from {spec.origin}, not from the wheel"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, pad_token_id=0, initializer_range=0.2, **sizes)).eval()
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7], [11, 12, 13, 14, 15]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    stock = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    with hf_paged.paged(model, on_unsupported="error"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), stock)
    command = Path(sys.executable).with_name("hf-paged")
    subprocess.run([command, "plugins"], check=True)
    print(f"the wheel works: hf_paged {importlib.metadata.version('hf-paged')}, tried outside of {checkout}")


if __name__ == "__main__":
    main()
