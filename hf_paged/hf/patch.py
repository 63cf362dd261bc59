"""patch, unpatch, paged, explain: putting the engine underneath `generate()`, and taking it away again."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from hf_paged import plugins
from hf_paged.config import PagedConfig
from hf_paged.engine.driver import Driver
from hf_paged.errors import ConfigError, UnsupportedCallError, UnsupportedModelError
from hf_paged.hf import generate
from hf_paged.hf.attention import registration
from hf_paged.hf.build import Built, build
from hf_paged.hf.prepare import STOCK_GENERATE, Unsupported, prepare
from hf_paged.hf.spec import unwrap
from hf_paged.ledger import Ledger
from hf_paged.types import CacheStats

logger = logging.getLogger(__name__)
_lock = threading.RLock()


class PatchedModel:
    """A model whose `generate()` runs on the engine; what `patch()` returns.

    Engines are built by the first call that needs one, one for each autocast setting, since keys computed under one are
    of no use under another.

    Args:
        model: the Transformers model.
        config: the options.
        seed: of the engine's own sampler, which serves `LLM`; `generate()` draws from torch's generator.
    """

    def __init__(self, model: PreTrainedModel, config: PagedConfig, seed: int | None = None) -> None:
        self.model = model
        self.config = config
        self._seed = seed
        self._ledger = Ledger()
        self._manager = plugins.load(config)
        self._engines: dict[Hashable, tuple[Built, Driver]] = {}
        self._refused: dict[Hashable, str] = {}
        self._warned: set[str] = set()
        self._keepers = 1 if config.keep_pool else 0
        self._building = threading.Lock()
        own = vars(model).get("generate") or functools.partial(type(model).generate, model)
        self._stock = own if not _is_ours(type(model).generate) else functools.partial(STOCK_GENERATE, model)
        plugins.call(self._manager, "prepare_model", model=model, ledger=self._ledger, config=config)
        registration.acquire()
        self._ledger.record("Transformers' registries", registration.release)

    # ------------------------------------------------------------------------------------------------------------- calls

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate()`: on the engine, or stock's where the engine can't carry the call."""
        try:
            driver = self.driver()
            with torch.no_grad():
                call = prepare(self.model, args, kwargs)
                _check_positions(driver, call.prompts, call.max_new_tokens)
        except (Unsupported, UnsupportedModelError) as reason:
            self._fall_back(str(reason))
            return self._stock(*args, **kwargs)
        return generate.generate(self.model, call, driver)

    def driver(self) -> Driver:
        """The driver for the caller's autocast setting; its engine is built at first use.

        Raises:
            UnsupportedModelError: the model can't be carried.
        """
        key = (_autocast(self.model.device.type), *(id(module) for module in self.model.modules()))
        with self._building:
            if key in self._refused:
                raise UnsupportedModelError(self._refused[key])
            if key not in self._engines:
                try:
                    built = build(self.model, self.config, self._manager, self._seed)
                except UnsupportedModelError as error:
                    self._refused[key] = str(error)
                    raise
                self._engines[key] = built, Driver(built.engine, release_when_idle=self._keepers == 0)
            return self._engines[key][1]

    def _fall_back(self, reason: str) -> None:
        message = f"hf_paged: {type(self.model).__name__}.generate() runs as in Transformers: {reason}"
        if self.config.on_unsupported == "error":
            raise UnsupportedCallError(message)
        if self.config.on_unsupported == "warn" and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(message, stacklevel=4)

    # ------------------------------------------------------------------------------------------------------------ memory

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used, over all engines of the model."""
        each = [built.engine.stats for built, _ in self._engines.values()]
        fields = [field.name for field in dataclasses.fields(CacheStats)]
        return CacheStats(**{name: sum(getattr(stats, name) for stats in each) for name in fields})

    def keep_pool(self) -> None:
        """Keep the KV pool, and the prefix cache, between calls from now on, until `give_pool_back` is called as often."""
        self._keepers += 1
        self._apply_keepers()

    def give_pool_back(self) -> None:
        """Undo one `keep_pool`; the last one gives the memory back, once no call is inside."""
        self._keepers -= 1
        self._apply_keepers()

    def _apply_keepers(self) -> None:
        for _, driver in self._engines.values():
            driver.set_release_when_idle(self._keepers == 0)

    # ------------------------------------------------------------------------------------------------------ on and off

    def install(self) -> None:
        """Put `generate` on the instance."""
        self._ledger.set_attribute(self.model, "generate", _PatchedGenerate(self))

    def remove(self) -> None:
        """Take everything back: the method, the registries, what plugins changed, the memory."""
        for built, driver in self._engines.values():
            driver.close()
            built.close()
        self._engines.clear()
        self._ledger.undo()


class _PatchedGenerate:
    """The `generate` that a patched model has: looks like stock's, and knows its PatchedModel."""

    def __init__(self, patched: PatchedModel) -> None:
        functools.update_wrapper(self, STOCK_GENERATE)
        self.patched = patched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.patched.generate(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self


def _generate_on_any_model(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate` under `patch()`: the first call patches the model."""
    return _implicitly_patched(self).generate(*args, **kwargs)


def _is_ours(function: Any) -> bool:
    return getattr(function, "__wrapped__", function) is _generate_on_any_model or function is _generate_on_any_model


class _Everywhere:
    """The state of `patch()` without a model."""

    def __init__(self) -> None:
        self.config: PagedConfig | None = None
        self.ledger = Ledger()
        self.models: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


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
    wanted = (config or PagedConfig()).replace(**options)
    with _lock:
        if model is None:
            _patch_everything(wanted)
            return None
        inner = unwrap(model)
        existing = patched(inner)
        if existing is None:
            existing = PatchedModel(inner, wanted)
            existing.install()
        elif (config is not None or options) and existing.config != wanted:
            raise ConfigError(f"{type(inner).__name__} is patched with other options already; unpatch it first")
        return existing


def unpatch(model: Any = None) -> None:
    """Undo `patch(model)`, or `patch()`. A model that isn't patched is left as it is."""
    with _lock:
        if model is not None:
            handle = patched(unwrap(model))
            if handle is not None:
                handle.remove()
            return
        _everywhere.ledger.undo()
        _everywhere.config = None
        for implicit in list(_everywhere.models):
            unpatch(implicit)
        _everywhere.models.clear()


@contextmanager
def paged(model: Any, config: PagedConfig | None = None, **options: Any) -> Iterator[PatchedModel]:
    """Have a model patched for a while. The KV pool, and the prefix cache, live from call to call until the end.

    Args, Raises: as for `patch`.
    """
    with _lock:
        inner = unwrap(model)
        before = patched(inner)
        handle = patch(inner, config, **options)
    assert handle is not None
    handle.keep_pool()
    try:
        yield handle
    finally:
        handle.give_pool_back()
        if before is None:
            unpatch(inner)


def patched(model: PreTrainedModel) -> PatchedModel | None:
    """The handle of a patched model, or None."""
    own = vars(model).get("generate")
    return own.patched if isinstance(own, _PatchedGenerate) else None


def _patch_everything(config: PagedConfig) -> None:
    if _everywhere.config is not None:
        if _everywhere.config != config:
            raise ConfigError("patch() is in force with other options already; call unpatch() first")
        return
    _everywhere.config = config
    wrapper = functools.wraps(STOCK_GENERATE)(_generate_on_any_model)
    _everywhere.ledger.set_attribute(GenerationMixin, "generate", wrapper)


def _implicitly_patched(model: PreTrainedModel) -> PatchedModel:
    with _lock:
        handle = patched(model)
        if handle is None:
            handle = PatchedModel(model, _everywhere.config or PagedConfig())
            handle.install()
            _everywhere.models.add(model)
        return handle


def _check_positions(driver: Driver, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Beyond the model's positions stock warns, and goes on as the family can."""
    most = driver.engine.model.max_positions
    longest = max(map(len, prompts)) + max_new_tokens
    if most is not None and longest > most:
        raise Unsupported(f"{longest} tokens of prompt and output are more than the model's {most} positions")


def _autocast(device: str) -> Hashable:
    return (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
