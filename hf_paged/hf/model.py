"""A Transformers model as the engine sees it: flat batches in, logits out."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_paged.batch import Batch, CacheSpec
from hf_paged.errors import UnsupportedModelError
from hf_paged.hf.attention import PagedStep, SeenLayer, stepping, switched
from hf_paged.hf.eager import eager
from hf_paged.hf.fusion.fusion import Fusion
from hf_paged.hf.invariant import InvariantOps, trusted
from hf_paged.hf.weights import WeightWatch, modules_of
from hf_paged.protocols import LayerPlan


class FlatModel:
    """The flat path: prefill and decode rows mixed, end to end in one row of the model's batch.

    The model is held weakly: it holds its engines, and its memory has to be free as soon as its user drops it.

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
        self._model = weakref.ref(model)
        self._modules = [layer.module for layer in layers]
        self._configs = configs
        self._keeps_logits = model._supports_logits_to_keep()
        self._takes_no_rows = _takes_no_rows(model.get_output_embeddings())
        self._weights = WeightWatch(model)
        self._eager = eager(modules_of(model))

    def forward(self, batch: Batch, plan: LayerPlan) -> torch.Tensor:
        if self.invariant is not None:
            plan = trusted(plan)
        wanted = batch.logits_indices
        if not len(wanted) and not self._takes_no_rows:
            wanted = wanted.new_zeros(1)
        fused = self.fusion.swaps.on() if self.fusion is not None else nullcontext()
        with self.uncompiled(), fused, self.invariant or nullcontext():
            logits = flat_forward(
                self.model,
                batch.input_ids,
                batch.positions,
                wanted,
                PagedStep(plan, self._modules, wanted, self.fusion),
                self._configs,
                keeps_logits=self._keeps_logits,
            )
        return logits[: len(batch.logits_indices)]

    @property
    def model(self) -> PreTrainedModel:
        """The live module.

        Raises:
            UnsupportedModelError: the model was garbage-collected.
        """
        model = self._model()
        if model is None:
            raise UnsupportedModelError("the model is gone: only its engine was kept")
        return model

    def uncompiled(self) -> AbstractContextManager[None]:
        """Inside, the model's forward goes past torch.compile."""
        return self._eager.on()

    def fingerprint(self) -> Hashable:
        if self.fusion is not None:
            self.fusion.rebind()
        return self._weights.fingerprint()

    def graph_key(self) -> Hashable:
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


def _takes_no_rows(head: Any) -> bool:
    """Whether an output head is known to take an input without rows; one of quantised weights may not."""
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and type(head.weight.data) is torch.Tensor
