"""A forward that takes a module's place during the engine's steps, and is the module's own at any other time."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hf_paged.hf.attention import PagedStep, current_step
from hf_paged.hf.fusion.layer import FusedLayer
from hf_paged.hf.fusion.merge import SharedStorageError
from hf_paged.hf.fusion.parts import TOLERANCE, GatedMLP, error
from hf_paged.protocols import Kernels, Norm

SHARED = "something else uses the memory of its weights"
# What a layer adds to its input may be much smaller than the input that both round.
LAYER_TOLERANCE = {dtype: 4 * limit for dtype, limit in TOLERANCE.items()}


class FusedForward:
    """The `forward` that a module has during the engine's steps.

    A forward of another thread may meet it there, and gets the module's own.

    Args:
        module: the module, without a forward of its own.
        fusion: which steps it serves: those that carry this object.
    """

    def __init__(self, module: nn.Module, fusion: object) -> None:
        self.module = module
        self.original = types.MethodType(type(module).forward, module)
        self._fusion = fusion

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output: the fused one during a step that it serves."""
        step = None if torch.compiler.is_compiling() else current_step()
        if step is None or step.fusion is not self._fusion:
            return self.original(*args, **kwargs)
        return self.serve(step, *args, **kwargs)

    def __reduce__(self) -> Any:
        """A copy of the model (deepcopy, pickle) that is made during a step has its class's forward."""
        return getattr, (self.module, "forward")

    def serve(self, step: PagedStep, *args: Any, **kwargs: Any) -> Any:
        """The module's output during a step."""
        return self.original(*args, **kwargs)


class NormForward(FusedForward):
    """A norm in one launch."""

    def __init__(self, module: nn.Module, fusion: object, kernels: Kernels, norm: Norm) -> None:
        super().__init__(module, fusion)
        self._kernels, self._norm = kernels, norm

    def serve(self, step: PagedStep, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        return self._kernels.norm(x.reshape(-1, x.shape[-1]), self._norm).view(x.shape)


class HeadForward(FusedForward):
    """The product that gives the logits, by the kernel for few rows where it serves them."""

    def __init__(self, module: nn.Linear, fusion: object, kernels: Kernels) -> None:
        super().__init__(module, fusion)
        self._kernels, self._linear = kernels, module

    def serve(self, step: PagedStep, *args: Any, **kwargs: Any) -> Any:
        (x,) = args
        out = self._kernels.linear(x.reshape(-1, x.shape[-1]), self._linear.weight, self._linear.bias)
        return out.view(*x.shape[:-1], self._linear.out_features)


class LayerForward(FusedForward):
    """A decoder layer by the candidate that agreed with it.

    Args:
        candidates: ways to compute the layer; a trial step picks the one that agrees.
        far: a position near the last one that the model has.
        last: whether it has the model's last attention: behind it, each token's output is its own and asked for only
            where its logits are.

    Attributes:
        rejected: why the layer runs as it is, once a trial has found no candidate that agrees; or None.
    """

    def __init__(
        self, module: nn.Module, fusion: object, candidates: list[FusedLayer], far: int, *, last: bool
    ) -> None:
        super().__init__(module, fusion)
        self.rejected: str | None = None
        self.trial = True
        self.last = last
        self._agreed = False
        self._candidates = candidates
        self._far = far

    def products(self, tokens: int) -> Iterable[tuple[torch.Tensor, Callable[[], object]]]:
        return self._candidates[0].products(tokens)

    def rebind(self) -> None:
        """Merge again what was taken apart: parameters that were given other storage.

        Where that storage is used by something else, the layer runs as it is from now on.
        """
        for merged in self._candidates[0].merged if self._candidates else ():
            if not merged.intact:
                try:
                    merged.bind()
                except SharedStorageError:
                    self._candidates, self.rejected = [], SHARED
                    return

    def end_trial(self) -> None:
        """From now on the candidate that agreed serves; without one the layer runs as it is."""
        self.trial = False
        if not self._agreed:
            self._candidates = []
            self.rejected = self.rejected or "the trial did not reach it"

    @property
    def gated(self) -> bool:
        """Whether its MLP is fused too."""
        return any(isinstance(candidate.mlp, GatedMLP) for candidate in self._candidates)

    def serve(self, step: PagedStep, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rotary = kwargs.get("position_embeddings")
        if not self._candidates or not isinstance(rotary, tuple) or hidden.shape[0] != 1:
            if self.rejected is None:
                self.rejected = "it gets no rotary embedding with its input"
            return self.original(*args, **kwargs)
        if not self.trial:
            cos, sin = rotary
            rows = step.wanted if self.last and len(step.wanted) < hidden.shape[1] else None
            return self._candidates[0](step, hidden, cos, sin, rows)
        return self._try(step, hidden, rotary, *args, **kwargs)

    def _try(self, step: PagedStep, hidden: torch.Tensor, rotary: tuple[torch.Tensor, ...], *a: Any, **kw: Any) -> Any:
        """The layer's own output; candidates that give another are dropped."""
        given, position = hidden.clone(), step.position
        elsewhere = self._at_the_far_end(*a, **kw)
        step.position = position
        wanted = self.original(*a, **kw)
        if not isinstance(wanted, torch.Tensor):
            self._candidates, self.rejected = [], f"its output is a {type(wanted).__name__}"
            return wanted
        after, errors, limit = step.position, [], LAYER_TOLERANCE[hidden.dtype]
        if elsewhere is not None and not error(elsewhere - given, wanted - given) <= limit:
            self._candidates, self.rejected = [], "what it computes depends on positions beyond its rotary embedding"
        while self._candidates:
            step.position = position
            try:
                got = self._candidates[0](step, given.clone(), *rotary)
                errors.append(error(got - given, wanted - given))
            except (TypeError, ValueError):  # a kernel doesn't take what this way of computing it hands over
                errors.append(math.inf)
            if errors[-1] <= limit:
                self._agreed = True
                break
            del self._candidates[0]
        else:
            self.rejected = self.rejected or f"fused, it gives another output (relative error {min(errors):.1e})"
        step.position = after
        return wanted

    def _at_the_far_end(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own output under the same rotation, told that its tokens are far behind; None: it isn't told."""
        told = [name for name in ("position_ids", "cache_position") if isinstance(kwargs.get(name), torch.Tensor)]
        if not told:
            return None
        return self.original(*args, **{**kwargs, **{name: torch.full_like(kwargs[name], self._far) for name in told}})
