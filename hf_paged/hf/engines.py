"""ModelEngines: the engines of one model, one for each autocast setting and each structure that the model had."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pluggy
import torch
from transformers import PreTrainedModel

from hf_paged import plugins
from hf_paged.config import PagedConfig
from hf_paged.engine.thread import EngineThread
from hf_paged.errors import HFPagedError, UnsupportedModelError, first_line, is_out_of_memory
from hf_paged.forks import after_fork
from hf_paged.hf.build import Built, build
from hf_paged.hf.spec import check_mode
from hf_paged.hf.weights import structure
from hf_paged.stats import CacheStats

Autocast = tuple[str, bool, torch.dtype]  # device type, whether it is on, and to what
Key = tuple[Autocast, Hashable]  # with the structure


@contextmanager
def looking() -> Iterator[None]:
    """Turn any unexpected error while inspecting a model into UnsupportedModelError.

    Raises:
        UnsupportedModelError: the look failed.
        HFPagedError: as it was raised.
    """
    try:
        yield
    except HFPagedError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"looking at it fails: {type(error).__name__}: {first_line(error)}") from error


class ModelEngines:
    """Builds an engine when a call first needs one, and closes those built for an earlier structure of the model.

    Keys computed under one autocast setting are of no use under another, so each setting has an engine.

    The model is held weakly: it holds what holds this, and its memory is free as soon as its user drops it.

    Args:
        model: the Transformers model.
        config: the engines' options.
        manager, registry: the plugins, and what they registered.
        seed: of the engines' own samplers.

    Attributes:
        closed: whether no engine is built any more.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: PagedConfig,
        manager: pluggy.PluginManager,
        registry: plugins.Registry,
        seed: int | None,
    ) -> None:
        self._model = weakref.ref(model)
        self._config = config
        self._manager, self._registry = manager, registry
        self._seed = seed
        self._engines: dict[Key, tuple[Built, EngineThread]] = {}
        self._refused: dict[Key, str] = {}
        self._past: list[CacheStats] = []  # of the engines that were dropped
        self._keepers = 1 if config.keep_pool else 0
        self._building = threading.Lock()
        self._left_behind: list[Built] = []  # by a fork
        self.closed = False
        _all.add(self)

    @property
    def model(self) -> PreTrainedModel:
        """The model.

        Raises:
            UnsupportedModelError: the model was garbage-collected.
        """
        model = self._model()
        if model is None:
            raise UnsupportedModelError("the model is gone: only its handle was kept")
        return model

    def get(self) -> tuple[Built, EngineThread]:
        """The engine for the caller's autocast setting, with its owner thread.

        It is built, and the model looked at, again when the model's modules, hooks or attention options changed.

        Raises:
            UnsupportedModelError: the model can't be carried.
            ConfigError, PluginError: an option is wrong, or a plugin failed.
        """
        model = self.model
        with looking():
            check_mode(model)  # not remembered: the mode may be another one at the next call
            key = (_autocast(model.device), structure(model))
        self._close_all_but(key[1])
        with self._building:
            if self.closed:
                raise UnsupportedModelError("it was unpatched meanwhile")
            self._forsake_left_behind()
            if key in self._engines and self._engines[key][0].engine.closed:
                self._drop(key)
            if key in self._refused:
                raise UnsupportedModelError(self._refused[key])
            if key not in self._engines:
                self._engines[key] = self._build(model, key)
            return self._engines[key]

    def _build(self, model: PreTrainedModel, key: Key) -> tuple[Built, EngineThread]:
        try:
            with looking():
                built = build(model, self._config, self._manager, self._registry, self._seed)
        except UnsupportedModelError as error:
            if not is_out_of_memory(error.__cause__):  # which passes
                self._refused[key] = str(error)
            raise
        context = functools.partial(_autocast_context, *key[0])
        return built, EngineThread(built.engine, context=context, release_when_idle=not self.keeps_pool)

    def _close_all_but(self, current: Hashable) -> None:
        """Close the engines of what the model was before; one with callers inside is left for the next time."""
        with self._building:
            for key in [key for key in self._refused if key[1] != current]:
                del self._refused[key]
            stale = [
                (key, thread) for key, (_, thread) in self._engines.items() if key[1] != current and not thread.busy
            ]
        for key, thread in stale:
            thread.close()  # not under the lock: a callback of its step may wait for that
            with self._building:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        """Forget an engine that was closed, and tell the plugins."""
        engine = self._engines.pop(key, None)
        if engine is not None:
            self._past = [_sum([*self._past, engine[0].engine.stats])]
            engine[0].tell_stopped()

    # ----------------------------------------------------------------------------------------------------------- memory

    @property
    def stats(self) -> CacheStats:
        """How the KV pools are and were used, over all engines."""
        return _sum([*self._past, *(built.engine.stats for built, _ in list(self._engines.values()))])

    @property
    def keeps_pool(self) -> bool:
        """Whether the pools outlive the calls at the moment."""
        return self._keepers > 0

    def keep_pool(self, more: int) -> None:
        """Add (1) or remove (-1) one user who wants the pools kept; at zero they are freed when idle."""
        with self._building:
            self._keepers += more
            threads = [thread for _, thread in self._engines.values()]
        for thread in threads:
            thread.set_release_when_idle(not self.keeps_pool)

    # -------------------------------------------------------------------------------------------------------------- end

    @property
    def are_built(self) -> bool:
        """Whether there is one: the model was seen to work."""
        return bool(self._engines)

    def abort(self, caller: threading.Thread | None = None) -> int:
        """Stop the calls of all threads, or of one; see `EngineThread.abort`."""
        return sum(thread.abort(caller) for _, thread in list(self._engines.values()))

    @property
    def in_callback(self) -> bool:
        """Whether this thread is inside a step of one of them: in a callback."""
        return any(thread.is_current for _, thread in list(self._engines.values()))

    def close(self) -> None:
        """Close all engines. Waits for the step that is under way, unless it is called from a callback of it."""
        self.closed = True
        with self._building:
            engines = dict(self._engines)
        for key, (_, thread) in engines.items():
            thread.close()
            with self._building:
                self._drop(key)
        self._forsake_left_behind()

    def begin_again(self) -> None:
        """In a forked child: the engines' threads are not here, so the engines are of no use.

        Most children never generate, so nothing is done to the weights before one does.
        """
        self._building = threading.Lock()
        self._left_behind += [built for built, _ in self._engines.values()]
        self._engines = {}

    def _forsake_left_behind(self) -> None:
        while self._left_behind:
            self._left_behind.pop().forsake()


_all: weakref.WeakSet[ModelEngines] = weakref.WeakSet()


@after_fork
def _begin_again() -> None:
    for engines in list(_all):
        engines.begin_again()


def _autocast(device: torch.device) -> Autocast:
    kind = device.type if device.type != "meta" else "cpu"  # meta: offloaded weights, which have no autocast
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _autocast_context(kind: str, enabled: bool, dtype: torch.dtype) -> AbstractContextManager[object]:
    """What has the owner thread compute as its callers would."""
    return torch.autocast(kind, dtype=dtype) if enabled else nullcontext()


def _sum(each: list[CacheStats]) -> CacheStats:
    fields = [field.name for field in dataclasses.fields(CacheStats)]
    return CacheStats(**{name: sum(getattr(stats, name) for stats in each) for name in fields})
