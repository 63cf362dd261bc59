"""Comparing a patched model with stock generate()."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_paged
import zoo
from hf_paged.types import CacheStats


def padded(rows: Sequence[Sequence[int]], side: str = "left", pad: int = zoo.PAD) -> dict[str, torch.Tensor]:
    """Rows as `input_ids` and `attention_mask`, as a tokenizer gives them."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        ids.append([pad] * gap + list(row) if side == "left" else list(row) + [pad] * gap)
        mask.append([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


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
