"""patch, unpatch, paged, explain: putting the engine underneath `generate()`, and taking it away again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
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
from hf_paged.hf.spec import check_mode, unwrap
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

    Attributes:
        visitors: how many are inside `paged()`, where nothing else patched the model; the last one takes the patch off.
    """

    def __init__(self, model: PreTrainedModel, config: PagedConfig, seed: int | None = None) -> None:
        self.model = model
        self.config = config
        self._seed = seed
        self._ledger = Ledger()
        self._manager = plugins.load(config)
        self._registry = plugins.registry(self._manager, config)
        self._engines: dict[Hashable, tuple[Built, Driver]] = {}
        self._refused: dict[Hashable, str] = {}
        self._warned: set[str] = set()
        self._keepers = 1 if config.keep_pool else 0
        self._building = threading.Lock()
        self._removed = False
        self.visitors: int | None = None
        self._stock, self._generate_reason = _stock_generate(model)
        try:
            plugins.call(self._manager, "prepare_model", model=model, ledger=self._ledger, config=config)
        except BaseException:
            self._ledger.undo()
            raise
        user = object()
        registration.acquire(user)
        # Called once: by unpatch, or when the model is gone.
        release = weakref.finalize(model, registration.release, user)
        release.atexit = False
        self._ledger.record("Transformers' registries", release)

    # ------------------------------------------------------------------------------------------------------------ calls

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate()`: on the engine, or stock's where the engine can't carry the call."""
        if self._removed:  # a reference to the patched method that outlived unpatch()
            return self._stock(*args, **kwargs)
        try:
            if self._generate_reason is not None:
                raise Unsupported(self._generate_reason)
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
        check_mode(self.model)  # not remembered: the mode may be another one at the next call
        kinds = frozenset((parameter.dtype, parameter.device) for parameter in self.model.parameters())
        key = (_autocast(self.model.device.type), kinds, *(id(module) for module in self.model.modules()))
        with self._building:
            if self._removed:
                raise UnsupportedModelError("it was unpatched meanwhile")
            if key in self._refused:
                raise UnsupportedModelError(self._refused[key])
            if key not in self._engines:
                try:
                    built = build(self.model, self.config, self._manager, self._registry, self._seed)
                except UnsupportedModelError as error:
                    self._refused[key] = str(error)
                    raise
                self._engines[key] = built, Driver(built.engine, release_when_idle=not self.keeps_pool)
            return self._engines[key][1]

    def _fall_back(self, reason: str) -> None:
        message = f"hf_paged: {type(self.model).__name__}.generate() runs as in Transformers: {reason}"
        if self.config.on_unsupported == "error":
            raise UnsupportedCallError(message)
        if self.config.on_unsupported == "warn" and reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(message, stacklevel=4)

    # ----------------------------------------------------------------------------------------------------------- memory

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used, over all engines of the model."""
        each = [built.engine.stats for built, _ in list(self._engines.values())]
        fields = [field.name for field in dataclasses.fields(CacheStats)]
        return CacheStats(**{name: sum(getattr(stats, name) for stats in each) for name in fields})

    def keep_pool(self) -> None:
        """Keep the KV pool, and the prefix cache, between calls until `give_pool_back` is called as often."""
        self._keep(1)

    def give_pool_back(self) -> None:
        """Undo one `keep_pool`; the last one gives the memory back, once no call is inside."""
        self._keep(-1)

    @property
    def keeps_pool(self) -> bool:
        """Whether the pool outlives the calls at the moment."""
        return self._keepers > 0

    def _keep(self, more: int) -> None:
        with self._building:
            self._keepers += more
            drivers = [driver for _, driver in self._engines.values()]
        for driver in drivers:
            driver.set_release_when_idle(not self.keeps_pool)

    # ------------------------------------------------------------------------------------------------------- on and off

    def install(self) -> None:
        """Put `generate` on the instance."""
        self._ledger.set_attribute(self.model, "generate", _PatchedGenerate(self))

    def remove(self) -> None:
        """Take everything back: the method, the registries, what plugins changed, the memory."""
        with self._building:
            self._removed = True
            engines = list(self._engines.values())
            self._engines.clear()
        for built, driver in engines:
            driver.close()  # between two steps of whoever drives: nobody else may touch the engine
            built.tell_stopped()
        self._ledger.undo()


class _PatchedGenerate:
    """The `generate` that a patched model has: looks like stock's, and knows its PatchedModel."""

    def __init__(self, patched: PatchedModel) -> None:
        functools.update_wrapper(self, STOCK_GENERATE)
        self.__signature__ = inspect.signature(types.MethodType(STOCK_GENERATE, patched.model))
        self.patched = patched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.patched.generate(*args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self

    def __reduce__(self) -> Any:
        """A copy of the model (deepcopy, pickle) generates as in Transformers until it is patched itself."""
        return _generate_of_class, (self.patched.model,)


def _generate_of_class(model: PreTrainedModel) -> Any:
    return types.MethodType(type(model).generate, model)


def _generate_on_any_model(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate` under `patch()`: the first call patches the model."""
    if _everywhere.config is None or type(self).generate is not GenerationMixin.generate:
        # Unpatched meanwhile; or called by a class's own generate(), as super()'s.
        return STOCK_GENERATE(self, *args, **kwargs)
    return _implicitly_patched(self).generate(*args, **kwargs)


def _stock_generate(model: PreTrainedModel) -> tuple[Callable[..., Any], str | None]:
    """What a model's `generate()` is without us, and why, if so, the engine can't take its place."""
    own = vars(model).get("generate")
    function = getattr(own, "__func__", None)
    known = (type(model).generate, STOCK_GENERATE)
    of_class = function in known or getattr(function, "__wrapped__", None) is STOCK_GENERATE
    if own is not None and not of_class:  # a copy of a patched model has its class's
        return own, "the model has a generate() of its own"
    if type(model).generate is GenerationMixin.generate:
        return functools.partial(STOCK_GENERATE, model), None
    return functools.partial(type(model).generate, model), f"{type(model).__name__} has a generate() of its own"


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
        if (config is not None or options) and existing.config != wanted:
            raise ConfigError(f"{type(inner).__name__} is patched with other options already; unpatch it first")
        existing.visitors = None
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
        visitors = before.visitors if before is not None else 0
        handle = patch(inner, config, **options)
        assert handle is not None
        handle.visitors = None if visitors is None else visitors + 1
        handle.keep_pool()
    try:
        yield handle
    finally:
        with _lock:
            handle.give_pool_back()
            if handle.visitors is not None:
                handle.visitors -= 1
                if handle.visitors == 0:
                    handle.remove()


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
