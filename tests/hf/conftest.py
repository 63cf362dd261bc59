"""What the tests of the seam share: one thread, tiny models, and nothing left patched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from stock import nothing_left_patched
from transformers import PreTrainedModel

import zoo

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test left patched, so that it fails alone; then nothing of ours may be left in Transformers."""
    with nothing_left_patched(monkeypatch):
        yield


@pytest.fixture
def llama() -> PreTrainedModel:
    """A model of two layers, fresh for each test."""
    return zoo.build("llama")
