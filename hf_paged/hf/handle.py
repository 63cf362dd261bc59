"""PatchedModel: a model whose `generate()` runs on the engine, and the engines that it has."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from hf_paged import plugins
from hf_paged.config import PagedConfig
from hf_paged.engine.driver import Driver
from hf_paged.errors import UnsupportedCallError, UnsupportedModelError, is_out_of_memory
from hf_paged.hf import generate
from hf_paged.hf.attention import registration
from hf_paged.hf.build import Built, build
from hf_paged.hf.prepare import STOCK_GENERATE, Unsupported, prepare
from hf_paged.hf.spec import check_mode
from hf_paged.hf.weights import structure
from hf_paged.ledger import Ledger
from hf_paged.types import CacheStats

lock = threading.RLock()  # guards which models are patched; nobody waits for an engine under it


class PatchedModel:
    """A model whose `generate()` runs on the engine; what `patch()` returns.

    Engines are built by the first call that needs one, one for each autocast setting, since keys computed under one are
    of no use under another.

    Args:
        model: the Transformers model.
        config: the options.
        seed: of the engine's own sampler, which serves `LLM`; `generate()` draws from torch's generator.

    Attributes:
        reason: why no call can run on the engine, whatever the model is like; or None.
        removed, gone: whether the patch is being taken off, and set when it is off.
        visitors: how many are inside `paged()`, where nothing else patched the model; the last one takes the patch off.
    """

    def __init__(self, model: PreTrainedModel, config: PagedConfig, seed: int | None = None) -> None:
        self.model = model
        self.config = config
        self._seed = seed
        self._ledger = Ledger()
        self._manager = plugins.load(config)
        self._registry = plugins.registry(self._manager, config)
        self._engines: dict[tuple[Hashable, Hashable], tuple[Built, Driver]] = {}
        self._refused: dict[tuple[Hashable, Hashable], str] = {}
        self._past: list[CacheStats] = []  # of the engines that were dropped
        self._warned: set[str] = set()
        self._keepers = 1 if config.keep_pool else 0
        self._building = threading.Lock()
        self.removed = False
        self.gone = threading.Event()
        self.visitors: int | None = None
        self.stock, self.reason = _stock_generate(model)
        try:
            plugins.call(self._manager, "prepare_model", model=model, ledger=self._ledger, config=config)
        except BaseException:
            self._ledger.undo()
            raise
        user = object()
        registration.acquire(user)
        # Called once: by unpatch, or when this is gone, with its model or with the LLM that nobody closed.
        release = weakref.finalize(self, registration.release, user)
        release.atexit = False
        self._ledger.record("Transformers' registries", release)

    # ------------------------------------------------------------------------------------------------------------ calls

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate()`: on the engine, or stock's where the engine can't carry the call."""
        if self.removed:  # a reference to the patched method that outlived unpatch()
            return self.stock(*args, **kwargs)
        try:
            if self.reason is not None:
                raise Unsupported(self.reason)
            driver = self.driver()
            with torch.no_grad():
                call = prepare(self.model, args, kwargs)
                _check_positions(driver, call.prompts, call.max_new_tokens)
        except (Unsupported, UnsupportedModelError) as reason:
            self._fall_back(str(reason))
            return self.stock(*args, **kwargs)
        return generate.generate(self.model, call, driver)

    def driver(self) -> Driver:
        """The driver of `engine()`."""
        return self.engine()[1]

    def engine(self) -> tuple[Built, Driver]:
        """The engine for the caller's autocast setting, with its driver; it is built at first use.

        It is built, and the model looked at, anew when the model's modules, hooks or attention options changed.

        Raises:
            UnsupportedModelError: the model can't be carried.
        """
        check_mode(self.model)  # not remembered: the mode may be another one at the next call
        key = (_autocast(self.model.device.type), structure(self.model))
        with self._building:
            if self.removed:
                raise UnsupportedModelError("it was unpatched meanwhile")
            self._drop_all_but(key[1])
            if key in self._refused:
                raise UnsupportedModelError(self._refused[key])
            if key not in self._engines:
                try:
                    built = build(self.model, self.config, self._manager, self._registry, self._seed)
                except UnsupportedModelError as error:
                    if not is_out_of_memory(error.__cause__):  # which passes
                        self._refused[key] = str(error)
                    raise
                self._engines[key] = built, Driver(built.engine, release_when_idle=not self.keeps_pool)
            return self._engines[key]

    def _drop_all_but(self, current: Hashable) -> None:
        """Close the engines of what the model was before; one with callers inside is left for the next time."""
        for key in [key for key in self._refused if key[1] != current]:
            del self._refused[key]
        for key, (_, driver) in list(self._engines.items()):
            if key[1] != current and not driver.busy:
                driver.close(wait=False)
                self._drop(key)

    def _drop(self, key: tuple[Hashable, Hashable]) -> None:
        """Forget an engine that was closed, and tell the plugins."""
        engine = self._engines.pop(key, None)
        if engine is not None:
            self._past = [_sum([*self._past, engine[0].engine.stats])]
            engine[0].tell_stopped()

    def _fall_back(self, reason: str) -> None:
        message = f"hf_paged: {type(self.model).__name__}.generate() runs as in Transformers: {reason}"
        if self.config.on_unsupported == "error":
            raise UnsupportedCallError(message)
        kind = re.sub(r"\d+", "", reason)
        if self.config.on_unsupported == "warn" and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)

    # ----------------------------------------------------------------------------------------------------------- memory

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used, over all engines of the model."""
        return _sum([*self._past, *(built.engine.stats for built, _ in list(self._engines.values()))])

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

    @property
    def driven_here(self) -> bool:
        """Whether this thread is inside a step of one of its engines: in a callback."""
        return any(driver.driven_here for _, driver in list(self._engines.values()))

    def remove(self) -> None:
        """Take everything back: the memory, what plugins changed, the registries, the method.

        Waits for the step that is under way, unless it is called from a callback of it.
        """
        with lock:
            self.removed = True
        with self._building:
            engines = dict(self._engines)
        try:
            for key, (_, driver) in engines.items():
                driver.close()
                with self._building:
                    self._drop(key)
        finally:
            with lock:
                self._ledger.undo()
            self.gone.set()


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


def patched(model: PreTrainedModel) -> PatchedModel | None:
    """The handle of a patched model, or None."""
    own = vars(model).get("generate")
    return own.patched if isinstance(own, _PatchedGenerate) else None


def _stock_generate(model: PreTrainedModel) -> tuple[Callable[..., Any], str | None]:
    """What a model's `generate()` is without us, and why, if so, the engine can't take its place."""
    own = vars(model).get("generate")
    if isinstance(own, _PatchedGenerate):
        return own.patched.stock, own.patched.reason
    function = getattr(own, "__func__", None)
    if not hasattr(type(model), "generate"):
        return _no_generate, f"{type(model).__name__} is not a Transformers model that generates"
    known = (type(model).generate, STOCK_GENERATE)
    of_class = function in known or getattr(function, "__wrapped__", None) is STOCK_GENERATE
    if own is not None and not of_class:  # a copy of a patched model has its class's
        return own, "the model has a generate() of its own"
    if type(model).generate is GenerationMixin.generate:
        return functools.partial(STOCK_GENERATE, model), None
    return functools.partial(type(model).generate, model), f"{type(model).__name__} has a generate() of its own"


def _no_generate(*args: Any, **kwargs: Any) -> Any:
    raise AttributeError("this model has no generate()")


def _check_positions(driver: Driver, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Beyond the model's positions stock warns, and goes on as the family can."""
    most = driver.engine.model.max_positions
    longest = max(map(len, prompts)) + max_new_tokens
    if most is not None and longest > most:
        raise Unsupported(f"{longest} tokens of prompt and output are more than the model's {most} positions")


def _autocast(device: str) -> Hashable:
    return (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))


def _sum(each: list[CacheStats]) -> CacheStats:
    fields = [field.name for field in dataclasses.fields(CacheStats)]
    return CacheStats(**{name: sum(getattr(stats, name) for stats in each) for name in fields})
