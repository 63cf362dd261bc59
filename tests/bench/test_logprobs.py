"""`hf-paged bench logprobs`: what it scores is what a plain forward gives, and its figures are the differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zoo
from hf_paged import cli
from hf_paged.bench import logprobs

ROWS = [[5 + (7 * i + 3 * j) % 50 for j in range(30)] for i in range(3)]


def test_hf_paged_scores_the_continuation_as_stock_does() -> None:
    model = zoo.build("llama")
    expected = logprobs.stock(model, ROWS, 20)
    assert expected.shape == (3, 10)
    by_hand = model(torch.tensor([ROWS[1]])).logits[0, 19].log_softmax(-1)[ROWS[1][20]].item()
    assert expected[1, 0].item() == pytest.approx(by_hand, abs=1e-5)
    got = logprobs.generated(model, ROWS, 20, {"num_blocks": 30, "max_num_batched_tokens": 16})
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.build("llama").bfloat16().save_pretrained(tmp_path)
    sizes = ["--requests", "2", "--prompt-len", "12", "--output-len", "6", "--device", "cpu"]
    assert cli.main(["bench", "logprobs", "--model", str(tmp_path), *sizes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["from_float32"]
    for engine in ("stock", "hf_paged"):
        assert 0 < found[engine]["mean"] <= found[engine]["p99"] <= found[engine]["max"]
    assert found["hf_paged"]["mean"] < 3 * found["stock"]["mean"]
    assert cli.main(["bench", "logprobs", "--model", str(tmp_path), "--dtype", "float32", *sizes]) == 2
    assert "float32; give --dtype bfloat16" in capsys.readouterr().err
