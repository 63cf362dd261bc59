"""What the tests of the seam share: one thread, tiny models, and nothing left patched."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_paged
import zoo
from hf_paged import PatchedModel

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test left patched, so that it fails alone; then nothing of ours may be left in Transformers."""
    handles: weakref.WeakSet[PatchedModel] = weakref.WeakSet()
    install = PatchedModel.install

    def noted(handle: PatchedModel) -> None:
        handles.add(handle)
        install(handle)

    monkeypatch.setattr(PatchedModel, "install", noted)
    yield
    hf_paged.unpatch()
    for handle in list(handles):
        handle.remove()
    assert "hf_paged" not in ALL_ATTENTION_FUNCTIONS._global_mapping


@pytest.fixture
def llama() -> PreTrainedModel:
    """A model of two layers, fresh for each test."""
    return zoo.build("llama")
