"""Fusion: the fused forwards of one model, put on and taken off as one."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_paged.errors import UnsupportedModelError
from hf_paged.forks import after_fork, renewed_after_fork
from hf_paged.hf.attention import SeenLayer
from hf_paged.hf.fusion.forward import SHARED, FusedForward, HeadForward, LayerForward, NormForward
from hf_paged.hf.fusion.layer import ROTATIONS, FusedLayer
from hf_paged.hf.fusion.merge import MergedLinear, SharedStorageError, is_plain
from hf_paged.hf.fusion.parts import WIRINGS, find_attention, find_mlp, find_norm
from hf_paged.hf.fusion.storage import holders
from hf_paged.hf.swaps import Swaps
from hf_paged.hf.untouched import is_untouched, is_watched
from hf_paged.protocols import Kernels


class Fusion:
    """What is fused of a model.

    Args:
        model: the live module.
        layers: its attention layers, as they were seen.
        kernels: what the fused forwards launch.
        kind: of kernels; see `acquire`.
        key: what the model was looked at with; see `acquire`.
        far: a position near the last one that the model has.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[SeenLayer],
        kernels: Kernels,
        kind: object,
        key: Hashable,
        far: int,
    ) -> None:
        self.kind, self.key = kind, key
        self._far = far
        self.users = 0
        self.trying = threading.Lock()  # of two engines that begin at once, one tries what is fused
        self.swaps = Swaps()
        self._model = weakref.ref(model)
        self._kernels = kernels
        self._shared_layers = 0
        self._merged: list[MergedLinear] = []
        self._layers: list[LayerForward] = []
        self._norms = 0
        self._head = False
        self._device = model.device
        try:
            self._install(model, layers)
            self._give_back()
        except BaseException:
            self.undo()
            raise

    # ---------------------------------------------------------------------------------------------------------- on, off

    def _install(self, model: PreTrainedModel, layers: Sequence[SeenLayer]) -> None:
        shared, parents, watched = holders(model), _parents(model), is_watched(model)
        inside: set[nn.Module] = set()
        for index, seen in enumerate(layers):
            layer = parents.get(seen.module)
            candidates = self._candidates(layer, seen, index, shared) if layer is not None else []
            if layer is not None and candidates:
                forward = LayerForward(layer, self, candidates, self._far, last=seen is layers[-1] and not watched)
                self._layers.append(forward)
                self._put(forward)
                inside.update(layer.modules())
        for module in model.modules():
            norm = find_norm(module, self._kernels) if module not in inside else None
            if norm is not None:
                self._norms += 1
                self._put(NormForward(module, self, self._kernels, norm))
        head = model.get_output_embeddings()
        # Tied weights are read here and never moved, so that they may be shared.
        if isinstance(head, nn.Linear) and is_plain(head, Counter({id(p): 1 for p in head.parameters()})):
            self._head = True
            self._put(HeadForward(head, self, self._kernels))

    def _candidates(self, layer: nn.Module, seen: SeenLayer, index: int, shared: Counter[int]) -> list[FusedLayer]:
        """The ways in which a layer may be computed; none, where its parts are not known."""
        if not is_untouched(layer):
            return []
        parts = {
            name: part
            for name, part in layer._modules.items()
            if part is not None and part is not seen.module and not isinstance(part, (nn.Dropout, nn.Identity))
        }
        norms = {name: norm for name, part in parts.items() if (norm := find_norm(part, self._kernels)) is not None}
        rest = [part for name, part in parts.items() if name not in norms]
        wirings = [wiring for wiring in WIRINGS if wiring.names == norms.keys()]
        if len(rest) != 1 or not wirings:
            return []
        try:
            attention = find_attention(seen, index, self._kernels, shared)
        except SharedStorageError:
            self._shared_layers += 1
            return []
        if attention is None:
            return []
        self._merged.append(attention.qkv)
        mlp = find_mlp(rest[0], shared)
        self._merged += [mlp.gate_up] if mlp is not None else []
        multiplier = float(getattr(layer, "residual_multiplier", 1.0))
        return [
            FusedLayer(self._kernels, attention, mlp or rest[0], wiring, norms, rotation, multiplier)
            for wiring, rotation in itertools.product(wirings, ROTATIONS)
        ]

    def _put(self, forward: FusedForward) -> None:
        self.swaps.add(forward.module, "forward", forward)

    def undo(self) -> None:
        """Take everything off: the modules' own forwards, a storage of its own for each parameter."""
        self.swaps.clear()
        while self._merged:
            merged = self._merged.pop()
            if self._model() is not None:  # else its weights go with it
                merged.restore()
        self._layers.clear()  # they hold the model's layers, which would live until a collection
        self._give_back()

    def _give_back(self) -> None:
        """Let the memory of replaced weights be had for tensors of any size, such as the KV pool's."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def rebind(self) -> None:
        """Merge again what was taken apart; see `LayerForward.rebind`."""
        for forward in self._layers:
            forward.rebind()

    # ------------------------------------------------------------------------------------------------------------ trial

    def rehearsals(self, *tokens: int) -> list[Callable[[], object]]:
        """Calls that make a layer's products of so many tokens, where kernels for them are compiled."""
        return [
            call
            for forward in self._layers[:1]
            for count in tokens
            for weight, call in forward.products(count)
            if self._kernels.compiles(count, weight)
        ]

    def end_trial(self) -> None:
        """From now on the fused forwards serve; layers that a trial step has not seen agree run as they are."""
        for forward in self._layers:
            forward.end_trial()

    @property
    def in_trial(self) -> bool:
        """Whether a trial step has still to tell which of its forwards agree."""
        return any(forward.trial for forward in self._layers)

    def report(self) -> Iterator[str]:
        """What is fused, and what is not and why, a line each."""
        served = [forward for forward in self._layers if forward.rejected is None]
        if served:
            gated = sum(forward.gated for forward in served)
            yield f"{len(served)} layers fused: merged products, norms, rotation with cache write; {gated} gated MLPs"
        if any(forward.last for forward in served):
            yield "the last layer's output computed only where logits are wanted"
        reasons = Counter(f.rejected for f in self._layers if f.rejected is not None)
        yield from (f"{count} layers run as they are: {reason}" for reason, count in reasons.items())
        if self._shared_layers:
            yield f"{self._shared_layers} layers run as they are: {SHARED}"
        if self._norms:
            yield f"{self._norms} norms fused"
        if self._head:
            yield "output head fused"


def _parents(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that each module is a direct part of."""
    return {child: parent for parent in model.modules() for child in parent.children()}


_lock = renewed_after_fork(threading.RLock())  # a collection that begins under it may release an engine's fusion
# Engines hold their fusion; this only finds it.
_fusions: weakref.WeakKeyDictionary[PreTrainedModel, weakref.ref[Fusion]] = weakref.WeakKeyDictionary()


def acquire(
    model: PreTrainedModel,
    layers: Sequence[SeenLayer],
    kernels: Kernels,
    kind: object,
    key: Hashable,
    far: int,
) -> Fusion:
    """The fusion of a model, shared by its engines until each has released it.

    Args:
        kernels, kind: what the fused forwards launch, and what tells them from other kernels.
        key: what the model was looked at with; a fusion of another key is void.
        far: a position near the last one that the model has.

    Raises:
        UnsupportedModelError: another engine of the model has it fused with kernels of another kind.
    """
    with _lock:
        known = _fusions.get(model)
        found = known() if known is not None else None
        if found is not None and not found.users:
            found = None  # it was taken off
        if found is not None and found.key == key and found.kind != kind:
            raise UnsupportedModelError(
                "another engine of this model, with another attention backend or `deterministic`, has its layers fused "
                "with other kernels; close that engine first (LLM.close(), unpatch())"
            )
        if found is not None and found.key != key:
            found.undo()
            found = None
        if found is None:
            found = Fusion(model, layers, kernels, kind, key, far)
            _fusions[model] = weakref.ref(found)
        found.users += 1
        return found


def release(fusion: Fusion) -> None:
    """Give a fusion back; the last engine's release takes it off."""
    with _lock:
        fusion.users -= 1
        if fusion.users == 0:
            fusion.undo()


@after_fork
def _void_all() -> None:
    """In a forked child: a thread that is not here may have been trying a fusion, or merging weights."""
    for known in list(_fusions.values()):
        fusion = known()
        if fusion is not None:
            fusion.key = object()
