"""PatchedModel: a model whose `generate()` runs on the engine; what `patch()` returns."""

from __future__ import annotations

import functools
import inspect
import re
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from hf_paged import plugins
from hf_paged.config import PagedConfig
from hf_paged.engine.thread import EngineThread
from hf_paged.errors import (
    EngineClosedError,
    RequestAbortedError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from hf_paged.forks import renewed_after_fork
from hf_paged.hf import generate, seam
from hf_paged.hf.attention import registration
from hf_paged.hf.build import Built
from hf_paged.hf.engines import ModelEngines, looking
from hf_paged.hf.notices import is_quiet, quiet, warn, warn_loudly
from hf_paged.hf.prepare import STOCK_GENERATE, Prepared, SeamBroken, Unsupported, bind, check, hand_over, read
from hf_paged.ledger import Ledger
from hf_paged.stats import CacheStats

lock = renewed_after_fork(threading.RLock())  # guards which models are patched; no engine is waited for under it


class PatchedModel:
    """A model whose `generate()` runs on the engine; what `patch()` returns. It doesn't keep the model alive.

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
        seam.tell_newer_release()
        self.config = config
        self._ledger = Ledger()
        self._manager = plugins.load(config)
        self._engines = ModelEngines(model, config, self._manager, plugins.registry(self._manager, config), seed)
        self._warned: set[str] = set()
        self._proven = False
        self.removed = False
        self.gone = threading.Event()
        self.visitors: int | None = None
        self._stock, self.reason = _stock_generate(model)
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

    @property
    def model(self) -> PreTrainedModel:
        """The Transformers model.

        Raises:
            UnsupportedModelError: the model was garbage-collected.
        """
        return self._engines.model

    @property
    def stock(self) -> Callable[..., Any]:
        """The `generate()` that the model has without the patch."""
        return functools.partial(self._stock, self.model)

    # ------------------------------------------------------------------------------------------------------------ calls

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate()`: on the engine, or stock's where the engine can't carry the call."""
        model = self.model
        if self.removed:  # a reference to the patched method that outlived unpatch()
            return self._stock(model, *args, **kwargs)
        try:
            call, thread = self._look_at(model, args, kwargs)
        except (Unsupported, UnsupportedModelError) as reason:
            if not self.removed:  # by another thread, while this one looked
                self._tell(model, reason)
            with quiet():
                return self._stock(model, *args, **kwargs)
        try:
            found = generate.generate(model, call, thread)
        except EngineClosedError:
            if call.seen:
                raise
        except RequestAbortedError:
            if call.seen or not (self.removed or thread.engine.closed):
                raise
        else:
            self._proven = True
            return found
        # The engine was closed before the caller saw a token: another one answers, or stock without the patch.
        return self.generate(*args, **kwargs)

    def _look_at(self, model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> tuple[Prepared, EngineThread]:
        """The call, ready for the engine, and the engine's thread.

        Raises:
            Unsupported, UnsupportedModelError: the engine can't carry it.
            HFPagedError: an option is wrong, or a plugin raised.
            whatever stock `generate()` raises for these arguments.
        """
        if self.reason is not None:
            raise Unsupported(self.reason)
        given = bind(model, args, kwargs)
        with looking():
            check(model, given)
        thread = self.thread()
        handed = hand_over(model, given)
        with looking():
            call = read(handed, given)
            _check_fits(thread, call)
        return call, thread

    def _tell(self, model: PreTrainedModel, reason: Exception) -> None:
        """Tell the caller that stock answers, and why: once a reason, and loudly where stock answers every call.

        Raises:
            UnsupportedCallError: under `on_unsupported="error"`.
        """
        if is_quiet():
            return
        broken = reason if isinstance(reason, SeamBroken) else self._broken_seam(model)
        said = seam.told(broken) if broken is not None else str(reason)
        message = f"hf_paged: {type(model).__name__}.generate() runs as in Transformers: {said}"
        if self.config.on_unsupported == "error":
            raise UnsupportedCallError(message)
        kind = re.sub(r"\d+", "", said)
        if kind in self._warned:
            return
        self._warned.add(kind)
        if broken is not None:
            warn_loudly(message)
        elif self.config.on_unsupported == "warn":
            warn(message)

    def _broken_seam(self, model: PreTrainedModel) -> SeamBroken | None:
        """Why not even a plain greedy call reaches the engine that was built; asked until one is known that does."""
        if self._proven or not self._engines.are_built:
            return None
        found = seam.why_stock(model)
        self._proven = found is None
        return found if isinstance(found, SeamBroken) else None

    def thread(self) -> EngineThread:
        """The owner thread of `engine()`."""
        return self.engine()[1]

    def engine(self) -> tuple[Built, EngineThread]:
        """The engine for the caller's autocast setting, with its owner thread; see `ModelEngines.get`."""
        return self._engines.get()

    def abort(self, caller: threading.Thread | None = None) -> int:
        """Stop the calls that are under way on the engine, or those of one thread: they raise RequestAbortedError.

        Returns:
            How many calls.
        """
        return self._engines.abort(caller)

    # ----------------------------------------------------------------------------------------------------------- memory

    @property
    def stats(self) -> CacheStats:
        """How the KV pool is and was used, over all engines of the model."""
        return self._engines.stats

    def keep_pool(self) -> None:
        """Keep the KV pool, and the prefix cache, between calls until `give_pool_back` is called as often."""
        self._engines.keep_pool(1)

    def give_pool_back(self) -> None:
        """Undo one `keep_pool`; the last one gives the memory back, once no call is inside."""
        self._engines.keep_pool(-1)

    # ------------------------------------------------------------------------------------------------------- on and off

    def install(self) -> None:
        """Put `generate` on the instance."""
        self._ledger.set_attribute(self.model, "generate", _PatchedGenerate(self))

    @property
    def in_callback(self) -> bool:
        """Whether this thread is inside a step of one of its engines: in a callback."""
        return self._engines.in_callback

    def remove(self) -> None:
        """Take everything back: the memory, what plugins changed, the registries, the method.

        Waits for the step that is under way, unless it is called from a callback of it.
        """
        with lock:
            self.removed = True
        try:
            self._engines.close()
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
        """A copy of the model (deepcopy, pickle) has its class's `generate`, also where hf_paged isn't installed."""
        return getattr, (self.patched.model, "generate")


def patched(model: PreTrainedModel) -> PatchedModel | None:
    """The handle of a patched model, or None."""
    own = vars(model).get("generate")
    return own.patched if isinstance(own, _PatchedGenerate) else None


Stock = Callable[..., Any]  # takes the model, then the call's arguments


def _stock_generate(model: PreTrainedModel) -> tuple[Stock, str | None]:
    """What a model's `generate()` is without us, and why, if so, the engine can't take its place."""
    own = vars(model).get("generate")
    if isinstance(own, _PatchedGenerate):
        return own.patched._stock, own.patched.reason
    function = getattr(own, "__func__", None)
    if not hasattr(type(model), "generate"):
        return _no_generate, f"{type(model).__name__} is not a Transformers model that generates"
    known = (type(model).generate, STOCK_GENERATE)
    of_class = function in known or getattr(function, "__wrapped__", None) is STOCK_GENERATE
    if own is not None and not of_class:  # a copy of a patched model has its class's
        return functools.partial(_without_model, own), "the model has a generate() of its own"
    if type(model).generate is GenerationMixin.generate:
        return STOCK_GENERATE, None
    return type(model).generate, f"{type(model).__name__} has a generate() of its own"


def _without_model(own: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    return own(*args, **kwargs)


def _no_generate(*args: Any, **kwargs: Any) -> Any:
    raise AttributeError("this model has no generate()")


def _check_fits(thread: EngineThread, call: Prepared) -> None:
    """Refuse what only the model tells: too few positions, or gaps that a window would count."""
    model = thread.engine.model
    longest = max(map(len, call.prompts)) + call.max_new_tokens
    # Beyond the model's positions stock warns, and goes on as the family can.
    if model.max_positions is not None and longest > model.max_positions:
        raise Unsupported(
            f"{longest} tokens of prompt and output are more than the model's {model.max_positions} positions"
        )
    windows = [window for window in model.spec.windows if window is not None]
    width = call.input_ids.shape[1] + call.max_new_tokens
    if call.has_gaps and windows and width > min(windows):
        raise Unsupported(
            "an attention mask with zeros between ones, which stock counts as part of a sliding window, is not carried "
            "on the engine"
        )
