"""`hf-paged bench kernels`: it hands over to the kernels' own benchmark, which needs a GPU."""

from __future__ import annotations

import pytest
import torch

from hf_paged import cli


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "kernels"]) == 2
    assert "bench kernels needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--json", "figures.json"]])
def test_it_runs_the_benchmark_of_the_kernels(arguments, monkeypatch):
    bench = pytest.importorskip("hf_paged_kernels.bench")
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "main", seen.append)
    assert cli.main(["bench", "kernels", *arguments]) == 0
    assert seen == [arguments]
