"""patch, unpatch, paged: putting the engine underneath `generate()`, and taking it away again."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from hf_paged.config import PagedConfig
from hf_paged.errors import ConfigError, UnsupportedCallError
from hf_paged.hf.handle import PatchedModel, lock, patched
from hf_paged.hf.prepare import STOCK_GENERATE
from hf_paged.hf.spec import unwrap
from hf_paged.ledger import Ledger

__all__ = ["PatchedModel", "paged", "patch", "patched", "unpatch"]


class _Everywhere:
    """The state of `patch()` without a model.

    Attributes:
        models: those that it patched, at their first call.
        excluded: those that `unpatch(model)` took out of it.
    """

    def __init__(self) -> None:
        self.config: PagedConfig | None = None
        self.ledger = Ledger()
        self.models: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self.excluded: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


_everywhere = _Everywhere()


def patch(model: Any = None, config: PagedConfig | None = None, **options: Any) -> PatchedModel | None:
    """Let `model.generate()` run over paged attention and continuous batching, on the model's own weights.

    Args:
        model: a Transformers model, or a PEFT, DDP or Accelerate wrapper of one. None: every model, each from its first
            `generate()` on, those of `transformers.pipeline()` too.
        config: the options.
        options: single options of PagedConfig, over those of `config`.

    Returns:
        A handle with `stats`, or None without a model. Patching twice is one patch.

    Raises:
        UnsupportedModelError: it is no Transformers model at all. (One that can't be carried runs as in Transformers.)
        ConfigError: an option is wrong, or the model is patched with other options.
    """
    wanted = PagedConfig.of(config, options)
    if model is None:
        _patch_everything(wanted)
        return None
    inner = unwrap(model)
    with _settled(inner):
        handle = _handle(inner, wanted, strict=config is not None or bool(options))
        handle.visitors = None
        _everywhere.models.discard(inner)  # unpatch() leaves it patched
        _everywhere.excluded.discard(inner)
        return handle


def unpatch(model: Any = None) -> None:
    """Undo `patch(model)`, or `patch()`. A model that isn't patched is left as it is.

    Under `patch()`, `unpatch(model)` takes the model out of it, until `patch(model)` or another `patch()`. A step that
    is under way in another thread is waited for.
    """
    if model is not None:
        inner = unwrap(model)
        with lock:
            handle = patched(inner)
            _everywhere.models.discard(inner)
            if _everywhere.config is not None:
                _everywhere.excluded.add(inner)
        if handle is not None:
            handle.remove()
        return
    with lock:
        _everywhere.ledger.undo()
        _everywhere.config = None
        _everywhere.excluded.clear()
    for implicit in list(_everywhere.models):
        handle = patched(implicit)
        if handle is not None:
            handle.remove()
        _everywhere.models.discard(implicit)


@contextmanager
def paged(model: Any, config: PagedConfig | None = None, **options: Any) -> Iterator[PatchedModel]:
    """Have a model patched for a while. The KV pool, and the prefix cache, live from call to call until the end.

    Args, Raises: as for `patch`. With `keep_pool=False` the pool lives as long as a call.
    """
    wanted = PagedConfig.of(config, options)
    inner = unwrap(model)
    with _settled(inner):
        before = patched(inner)
        handle = _handle(inner, wanted, strict=config is not None or bool(options))
        visitors = before.visitors if before is not None else 0
        handle.visitors = None if visitors is None else visitors + 1
        keeps = handle.config.keep_pool is not False
        if keeps:
            handle.keep_pool()
    try:
        yield handle
    finally:
        if keeps:
            handle.give_pool_back()
        with lock:
            if handle.visitors is not None:
                handle.visitors -= 1
                last = handle.visitors == 0
                handle.removed = handle.removed or last  # who comes now waits until it is off, and patches anew
            else:
                last = False
        if last:
            handle.remove()


@contextmanager
def _settled(model: PreTrainedModel) -> Iterator[None]:
    """The lock, while no patch is being taken off the model."""
    while True:
        with lock:
            handle = patched(model)
            if handle is None or not handle.removed:
                yield
                return
        if handle.in_callback:
            raise UnsupportedCallError("the model is being unpatched, and this is a callback of its generate()")
        handle.gone.wait()


def _handle(model: PreTrainedModel, config: PagedConfig, *, strict: bool) -> PatchedModel:
    """The handle of a model, which is patched now if it wasn't; if `strict`, with these very options."""
    handle = patched(model)
    if handle is None:
        handle = PatchedModel(model, config)
        handle.install()
    if strict and handle.config != config:
        raise ConfigError(f"{type(model).__name__} is patched with other options already; unpatch it first")
    return handle


def _patch_everything(config: PagedConfig) -> None:
    with lock:
        if _everywhere.config is not None and _everywhere.config != config:
            raise ConfigError("patch() is in force with other options already; call unpatch() first")
        _everywhere.excluded.clear()
        if _everywhere.config is None:
            _everywhere.config = config
            wrapper = functools.wraps(STOCK_GENERATE)(_generate_on_any_model)
            _everywhere.ledger.set_attribute(GenerationMixin, "generate", wrapper)


def _generate_on_any_model(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate` under `patch()`: the first call patches the model."""
    own = type(self).generate is not GenerationMixin.generate
    if _everywhere.config is None or own or self in _everywhere.excluded:
        # Unpatched meanwhile; or called by a class's own generate(), as super()'s.
        return STOCK_GENERATE(self, *args, **kwargs)
    return _implicitly_patched(self).generate(*args, **kwargs)


def _implicitly_patched(model: PreTrainedModel) -> PatchedModel:
    with lock:
        handle = patched(model)
        if handle is None:
            handle = PatchedModel(model, _everywhere.config or PagedConfig())
            handle.install()
            _everywhere.models.add(model)
        return handle
