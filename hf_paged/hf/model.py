"""A Transformers model as the engine sees it: flat batches in, logits out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged.hf.attention import PagedStep, SeenLayer, stepping, switched
from hf_paged.hf.fusion.fusion import Fusion
from hf_paged.hf.invariant import InvariantOps, trusted
from hf_paged.hf.weights import WeightWatch
from hf_paged.protocols import LayerPlan
from hf_paged.types import Batch, CacheSpec


class FlatModel:
    """The flat path: prefill and decode rows mixed, end to end in one row of the model's batch.

    Args:
        model: the live module.
        spec: what its attention layers keep.
        layers: its attention layers, in the order in which they call.
        configs: the configs that name its attention.
        num_logits: columns of its logits, which need not be as many as its embeddings.
        max_positions: tokens that its positions reach, or None.

    Attributes:
        fusion: the fused forwards that serve it, or None.
        invariant: watches its forwards in deterministic mode, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: CacheSpec,
        layers: Sequence[SeenLayer],
        configs: Sequence[Any],
        num_logits: int,
        max_positions: int | None,
    ) -> None:
        self.spec = spec
        self.max_positions = max_positions
        self.num_logits = num_logits
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.layers = layers
        self.fusion: Fusion | None = None
        self.invariant: InvariantOps | None = None
        self._model = model
        self._modules = [layer.module for layer in layers]
        self._configs = configs
        self._keeps_logits = model._supports_logits_to_keep()
        self._weights = WeightWatch(model)

    def forward(self, batch: Batch, plan: LayerPlan) -> torch.Tensor:
        """See `PagedModel.forward`."""
        if self.invariant is not None:
            plan = trusted(plan)
        with self.invariant or nullcontext():
            return flat_forward(
                self._model,
                batch.input_ids,
                batch.positions,
                batch.logits_indices,
                PagedStep(plan, self._modules, batch.logits_indices, self.fusion),
                self._configs,
                keeps_logits=self._keeps_logits,
            )

    def fingerprint(self) -> Hashable:
        """See `PagedModel.fingerprint`."""
        if self.fusion is not None:
            self.fusion.rebind()
        return self._weights.fingerprint()

    def graph_key(self) -> Hashable:
        """See `PagedModel.graph_key`."""
        return self._weights.graph_key()


def flat_forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    logits_indices: torch.Tensor,
    step: PagedStep,
    configs: Sequence[Any],
    *,
    keeps_logits: bool,
) -> torch.Tensor:
    """One forward over a flat batch.

    Args:
        input_ids, positions: int64 [T].
        logits_indices: int64 [S], the tokens whose logits are wanted.
        keeps_logits: whether the model computes those alone.

    Returns:
        Logits [S, vocabulary].
    """
    only = {"logits_to_keep": logits_indices} if keeps_logits else {}
    with stepping(step), switched(configs):
        output = model(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, return_dict=True, **only
        )
    return output.logits[0] if keeps_logits else output.logits[0, logits_indices]
