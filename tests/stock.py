"""Comparing a patched model with stock generate()."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_paged
import zoo
from hf_paged import PatchedModel
from hf_paged.hf.prepare import STOCK_GENERATE
from hf_paged.stats import CacheStats

RELEASE = Version(transformers.__version__)
OLD = Version("5.20") > RELEASE
EAGER_ON_OLD = ("gemma2", "vaultgemma")  # stock's sdpa drops the soft-cap there


def build(family: str) -> PreTrainedModel:
    """A model of the zoo, with an attention that stock computes right."""
    model = zoo.build(family)
    if OLD and family in EAGER_ON_OLD:
        model.set_attn_implementation("eager")
    return model


def padded(rows: Sequence[Sequence[int]], side: str = "left", pad: int = zoo.PAD) -> dict[str, torch.Tensor]:
    """Rows as `input_ids` and `attention_mask`, as a tokenizer gives them."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        ids.append([pad] * gap + list(row) if side == "left" else list(row) + [pad] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def rows_of(output: torch.Tensor, width: int) -> list[list[int]]:
    """The new tokens of each row, up to its end."""
    tails = output[:, width:].tolist()
    return [tail[: tail.index(zoo.EOS) + 1] if zoo.EOS in tail else tail for tail in tails]


class Expected:
    """Stock's tokens for a batch; for a row whose tokens padding changes, those of the row alone."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], **kwargs: Any) -> None:
        self.model, self.prompts, self.kwargs = model, prompts, kwargs
        self.batch = {name: tensor.to(model.device) for name, tensor in padded(prompts).items()}
        self.width = self.batch["input_ids"].shape[1]
        self.rows = rows_of(model.generate(**self.batch, **kwargs), self.width)

    def of(self, output: torch.Tensor) -> list[list[int]]:
        """What `output`, of the model while it is patched, has to be."""
        for index, (row, prompt) in enumerate(zip(rows_of(output, self.width), self.prompts, strict=True)):
            if row != self.rows[index]:
                alone = torch.tensor([prompt], device=self.model.device)
                self.rows[index] = rows_of(STOCK_GENERATE(self.model, alone, **self.kwargs), len(prompt))[0]
        return self.rows


def both(
    model: PreTrainedModel, *args: Any, seed: int = 7, options: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[Any, Any]:
    """What stock and patched generate() give for the same seed; each is also asked for its next random number.

    A value of `kwargs` may be a function without arguments marked by `fresh`, called anew for each of the two.
    """
    results = []
    for patched in (False, True):
        own = {name: value() if isinstance(value, fresh) else value for name, value in kwargs.items()}
        if patched:
            hf_paged.patch(model, **{"on_unsupported": "error", **(options or {})})
        try:
            torch.manual_seed(seed)
            result = model.generate(*args, **own)
            results.append((result, torch.rand(3)))
        finally:
            if patched:
                hf_paged.unpatch(model)
    return results[0], results[1]


class fresh:
    """An argument that is made anew for each call."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self) -> Any:
        return self._make()


def assert_same(model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Patched generate() runs on the engine, with stock's tokens, shape, dtype, device and RNG state. Returns both."""
    (expected, expected_rng), (got, rng) = both(model, *args, **kwargs)
    assert type(got) is type(expected)
    same_tensor(sequences(got), sequences(expected))
    assert torch.equal(rng, expected_rng)
    return got, expected


def sequences(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.sequences


def same_tensor(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    assert got.tolist() == expected.tolist()


def free(stats: CacheStats) -> bool:
    """Whether no request holds a block."""
    return stats.num_free == stats.num_blocks


def snapshot(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """`vars()` of the model, of all its modules and configs, and of Transformers' registries."""
    seen: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        seen[f"module {name}"] = {key: _plain(value) for key, value in vars(module).items()}
        if hasattr(module, "config"):
            seen[f"config {name}"] = {key: repr(value) for key, value in vars(module.config).items()}
    seen["generation config"] = {key: repr(value) for key, value in vars(model.generation_config).items()}  # type: ignore[arg-type]
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        seen[type(registry).__name__] = {**type(registry)._global_mapping, **registry._local_mapping}
    seen["mixin"] = {"generate": type(model).generate}
    return seen


def _plain(value: Any) -> Any:
    """A value that can be compared: containers by their contents, everything else by identity."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


@contextmanager
def caught() -> Iterator[list[str]]:
    """The texts of hf_paged's own warnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(one.message) for one in found if "hf_paged" in str(one.message))


@contextmanager
def nothing_left_patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take every patch off that is put on inside, an open LLM's too; then nothing of ours may be in Transformers."""
    handles: weakref.WeakSet[PatchedModel] = weakref.WeakSet()
    make = PatchedModel.__init__

    def noted(handle: PatchedModel, *args: Any, **kwargs: Any) -> None:
        make(handle, *args, **kwargs)
        handles.add(handle)

    monkeypatch.setattr(PatchedModel, "__init__", noted)
    yield
    hf_paged.unpatch()
    for handle in list(handles):
        handle.remove()
    assert "hf_paged" not in ALL_ATTENTION_FUNCTIONS._global_mapping
