"""Between a model and its engine: fused forwards tried and put on, deterministic mode, and the proof of the whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_paged.config import PagedConfig
from hf_paged.errors import UnsupportedModelError
from hf_paged.hf.fusion.fusion import Fusion, acquire, release
from hf_paged.hf.invariant import InvariantOps, trusted
from hf_paged.hf.model import FlatModel
from hf_paged.hf.verify import try_fusion, verify, verify_invariance
from hf_paged.hf.weights import structure
from hf_paged.protocols import AttentionBackend, Kernels

logger = logging.getLogger(__name__)

# Tokens: those of the trials and of the first answers, to the kernels; and some for each tile that prompts take, where
# kernels make those products (in deterministic mode).
REHEARSED = (1, 16, 100, 300, 2048)
FAR = 4096  # where a model doesn't say how far its positions reach


def adopt(model: PreTrainedModel, flat: FlatModel, backend: AttentionBackend, config: PagedConfig) -> str | None:
    """Make `flat` what the engine shall run, and prove it. Returns why nothing is fused, or None.

    Raises:
        UnsupportedModelError: the model can't be carried; the message says why.
    """
    kernels: Kernels | None = getattr(backend, "kernels", None)
    try:
        unfused = _fuse(model, flat, backend, kernels, config)
        if config.deterministic:
            assert kernels is not None
            flat.invariant = InvariantOps(kernels)
        unfused = _verify(model, flat, backend, config) or unfused
        if config.deterministic:
            verify_invariance(model, flat, backend, config.block_size)
    except BaseException:
        _unfuse(flat)
        raise
    return unfused


def _fuse(
    model: PreTrainedModel, flat: FlatModel, backend: AttentionBackend, kernels: Kernels | None, config: PagedConfig
) -> str | None:
    """Have fused forwards serve the model's steps, as far as each agrees. Returns why there are none, or None.

    Raises:
        UnsupportedModelError: in deterministic mode, if another engine has the model's layers fused with its kernels.
    """
    if kernels is None or not config.fusions:
        return "the attention backend has no kernels for it" if config.fusions else f"fusions={config.fusions}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    far = max((flat.max_positions or FAR) - 1, 0)
    kind = type(kernels), config.deterministic
    try:
        own = trusted(kernels) if config.deterministic else kernels
        flat.fusion = acquire(model, flat.layers, own, kind, structure(model), far)
    except UnsupportedModelError as error:
        if config.deterministic:
            raise
        logger.warning("%s runs unfused: %s", type(model).__name__, error)
        return str(error)
    try:
        with flat.fusion.trying:
            if flat.fusion.in_trial:
                _rehearse(flat.fusion, flat, backend)
                try_fusion(model, flat, backend, config.block_size)
                flat.fusion.end_trial()
    except Exception as error:
        logger.warning("%s runs unfused, for a trial of its fused layers failed: %s", type(model).__name__, error)
        _unfuse(flat)
        return f"a trial failed: {type(error).__name__}: {error}"
    return None


def _rehearse(fusion: Fusion, flat: FlatModel, backend: AttentionBackend) -> None:
    """Launch once what a first answer needs, side by side: a kernel is compiled when it is first launched."""
    device = flat.spec.device
    if device.type != "cuda":
        return
    calls = fusion.rehearsals(*REHEARSED)
    sampling = getattr(backend, "sampling", None)
    if sampling is not None:
        logits = torch.zeros(1, flat.num_logits, dtype=flat.spec.dtype, device=device)
        calls.append(partial(sampling.argmax, logits))

    def launch(call: Callable[[], object]) -> None:
        with torch.no_grad(), torch.cuda.device(device):
            call()

    if calls:
        with ThreadPoolExecutor(len(calls)) as pool:
            list(pool.map(launch, calls))


def _unfuse(flat: FlatModel) -> None:
    if flat.fusion is not None:
        release(flat.fusion)
        flat.fusion = None


def _verify(model: PreTrainedModel, flat: FlatModel, backend: AttentionBackend, config: PagedConfig) -> str | None:
    """Prove the model; if it fails with fused forwards, without them. Returns why these were taken off, or None."""
    try:
        verify(model, flat, backend, config.block_size)
    except UnsupportedModelError as error:
        if flat.fusion is None or flat.invariant is not None:  # which its fused layers are needed for
            raise
        logger.warning("%s runs unfused, for with its fused layers %s", type(model).__name__, error)
        _unfuse(flat)
        verify(model, flat, backend, config.block_size)
        return str(error)
    return None
