"""The cache that `generate(return_dict_in_generate=True)` returns, computed when somebody looks at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_paged.errors import UnsupportedCallError
from hf_paged.hf.spec import check_mode
from hf_paged.hf.weights import WeightWatch


class ReplayedCache(DynamicCache):
    """Stock's `past_key_values` after a call: keys and values of every token but the last.

    The engine's blocks went back to the pool when the call ended, and few callers ever read this. On first use one
    forward over the sequences fills it, if the weights are still the same.

    Args:
        model: what filled it.
        sequences: int64 [rows, tokens], padded on the left.
        width: tokens of the padded prompts.
        prompts: the prompts without padding.
    """

    def __init__(
        self, model: PreTrainedModel, sequences: torch.Tensor, width: int, prompts: Sequence[list[int]]
    ) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        self._weights = WeightWatch(model)
        # Layers that were fused in the engine have their weights elsewhere once it is gone.
        self._fingerprint = self._weights.fingerprint(places=False)
        self._replay: tuple[Any, ...] | None = (model, sequences, width, prompts)

    @property
    def layers(self) -> Any:
        """The cache's layers, filled."""
        self._fill()
        return self._layers

    @layers.setter
    def layers(self, layers: Any) -> None:
        self._layers = layers

    def _fill(self) -> None:
        if getattr(self, "_replay", None) is None:
            return
        model, sequences, width, prompts = self._replay  # type: ignore[misc]
        check_mode(model)
        if self._weights.fingerprint(places=False) != self._fingerprint:
            raise UnsupportedCallError(
                "the weights or adapters changed after generate() returned this cache, which is computed when it is "
                "first read; read it earlier (cache.get_seq_length() will do), or take the patch off for this call"
            )
        self._replay = None
        tokens = sequences[:, :-1].to(model.device)
        mask = torch.ones_like(tokens)
        for row, prompt in zip(mask, prompts, strict=True):
            row[: width - len(prompt)] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=self, use_cache=True)
