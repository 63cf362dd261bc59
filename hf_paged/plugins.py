"""Plugins: one plugin manager an engine, and what the plugins registered with it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import itertools
import logging
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pluggy

from hf_paged import hookspecs
from hf_paged.batch import CacheSpec
from hf_paged.config import PagedConfig
from hf_paged.engine.blocks import LRUPolicy
from hf_paged.engine.scheduler import FCFSScheduler, PriorityScheduler
from hf_paged.errors import ConfigError, HFPagedError, PluginError
from hf_paged.protocols import AttentionBackend, CachePolicy, LogitsProcessor, StepObserver
from hf_paged.request import Request
from hf_paged.stats import StepStats

logger = logging.getLogger(__name__)

# Bundled plugins, in the order in which they are asked.
BUNDLED = (
    "hf_paged_triton",
    "hf_paged_sdpa",
    "hf_paged_structured",
    "hf_paged_metrics",
    "hf_paged_otel",
    "hf_paged_dashboard",
)


class Core:
    """What hf_paged itself registers, through the hooks that any plugin has."""

    @hookspecs.hookimpl
    def register_schedulers(self, register: Callable[[str, type], None]) -> None:
        """FCFS and priority."""
        register("fcfs", FCFSScheduler)
        register("priority", PriorityScheduler)

    @hookspecs.hookimpl
    def register_cache_policies(self, register: Callable[[str, Callable[[], CachePolicy]], None]) -> None:
        """LRU."""
        register("lru", LRUPolicy)


def load(config: PagedConfig) -> pluggy.PluginManager:
    """A manager with the bundled plugins, those of installed packages, and the config's own.

    Raises:
        ConfigError: `disable_plugins` names one that there isn't.
        PluginError: a plugin can't be imported, is there twice, has no hooks, or one that doesn't exist.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    installed = [point.name for point in importlib.metadata.entry_points(group=hookspecs.PROJECT)]
    for name in config.disable_plugins:
        pick("disable_plugins", name, {"core", *BUNDLED, *installed})
        manager.set_blocked(name)
    _register(manager, Core(), "core")
    for name in BUNDLED:
        if not manager.is_blocked(name):
            _register(manager, _bundled(name), name)
    for name in installed:
        if manager.has_plugin(name):
            raise PluginError(f"two plugins are named {name!r}; uninstall one, or leave them out with disable_plugins")
        try:
            manager.load_setuptools_entrypoints(hookspecs.PROJECT, name)
        except Exception as error:
            raise PluginError(f"plugin {name!r} can't be loaded: {type(error).__name__}: {error}") from error
    for plugin in config.plugins:
        _register_given(manager, plugin)
    try:
        manager.check_pending()  # a misspelt hook must not be silently ignored
    except pluggy.PluginValidationError as error:
        raise PluginError(f"plugin {manager.get_name(error.plugin)!r}: {error}") from error
    return manager


def _register_given(manager: pluggy.PluginManager, plugin: Any) -> None:
    """Register a plugin of the config's, under a name of its own: several may be of one class."""
    if isinstance(plugin, type):
        raise PluginError(f"plugins holds the class {plugin.__name__}; give an object of it: {plugin.__name__}()")
    base = getattr(plugin, "__name__", None) or type(plugin).__name__
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if not manager.has_plugin(name) and not manager.is_blocked(name))
    _register(manager, plugin, name)
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"plugin {name!r} has no hooks; mark its functions with @hf_paged.hookimpl")


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    if manager.is_registered(plugin):
        raise PluginError(f"plugin {manager.get_name(plugin)!r} is given, but it is loaded already")
    try:
        manager.register(plugin, name)
    except (ValueError, pluggy.PluginValidationError) as error:
        raise PluginError(f"plugin {name!r}: {error}") from error


def loaded(manager: pluggy.PluginManager) -> list[tuple[str, str]]:
    """The name of each plugin, and where it comes from."""
    installed = {id(plugin): f"{dist.project_name} {dist.version}" for plugin, dist in manager.list_plugin_distinfo()}
    found = []
    for name, plugin in manager.list_name_plugin():
        if plugin is not None:
            bundled = name == "core" or name in BUNDLED
            found.append((name, "bundled" if bundled else installed.get(id(plugin), "given to the engine")))
    return found


def hooks_of(manager: pluggy.PluginManager, name: str) -> list[str]:
    """The hooks that a loaded plugin answers."""
    return sorted(caller.name for caller in manager.get_hookcallers(manager.get_plugin(name)) or ())


@dataclasses.dataclass(frozen=True)
class Registry:
    """What the plugins of one engine registered."""

    backends: dict[str, Callable[[CacheSpec], AttentionBackend]]
    schedulers: dict[str, type[FCFSScheduler]]
    policies: dict[str, Callable[[], CachePolicy]]
    processors: list[LogitsProcessor]
    observers: list[StepObserver]


def registry(manager: pluggy.PluginManager, config: PagedConfig) -> Registry:
    """Run the hooks that register things, and see that the config names only what is there.

    Raises:
        PluginError: a plugin raised, or registered a name that is taken.
        ConfigError: the config names a scheduler, cache policy or attention backend that isn't registered.
    """
    found = Registry({}, {}, {}, [], [])
    call(manager, "validate_config", config=config)
    call(manager, "register_attention_backends", register=_into(found.backends, "attention backend"), config=config)
    call(manager, "register_schedulers", register=_into(found.schedulers, "scheduler"), config=config)
    call(manager, "register_cache_policies", register=_into(found.policies, "cache policy"), config=config)
    call(manager, "register_logits_processors", register=found.processors.append, config=config)
    call(manager, "register_step_observers", register=lambda observer: found.observers.append(_Guarded(observer)))
    pick("scheduler", config.scheduler, found.schedulers)
    pick("cache_policy", config.cache_policy, found.policies)
    if config.attention_backend is not None:
        pick("attention_backend", config.attention_backend, found.backends)
    return found


def choose_backend(manager: pluggy.PluginManager, found: Registry, config: PagedConfig, spec: CacheSpec) -> str:
    """The name of the attention backend: the config's, or what the plugins choose.

    Raises:
        PluginError: a plugin chose one that isn't registered, or none chose.
    """
    if config.attention_backend is not None:
        return config.attention_backend
    arguments = {"spec": spec, "device": spec.device, "names": tuple(found.backends)}
    name = call(manager, "select_attention_backend", **arguments)
    known = ", ".join(found.backends) or "none"
    if name is None:
        raise PluginError(f"no plugin chose an attention backend for {spec.device}; registered are {known}")
    if name not in found.backends:
        chooser = _who_answered(manager.hook.select_attention_backend, name, arguments)
        raise PluginError(f"plugin {chooser!r} chose the attention backend {name!r}; registered are {known}")
    return name


def pick(option: str, name: str, known: Iterable[str]) -> str:
    """The name, if it is registered.

    Raises:
        ConfigError: it isn't; the message lists those that are.
    """
    if name not in known:
        raise ConfigError(f"{option}={name!r} is not registered; known are {', '.join(sorted(known)) or 'none'}")
    return name


def call(manager: pluggy.PluginManager, hook: str, **arguments: Any) -> Any:
    """Call a set-up hook. What a plugin raises comes out as PluginError with the plugin's name.

    Raises:
        PluginError: a plugin raised.
    """
    caller = getattr(manager.hook, hook)
    try:
        return caller(**arguments)
    except Exception as error:
        name = _culprit(caller, error)
        raise PluginError(f"plugin {name!r} failed in {hook}: {type(error).__name__}: {error}") from error


def made(what: str, name: str, factory: Callable[..., Any], *arguments: Any) -> Any:
    """What a registered factory makes.

    Raises:
        PluginError: it raised.
    """
    try:
        return factory(*arguments)
    except Exception as error:
        raise PluginError(f"the {what} {name!r} can't be made: {type(error).__name__}: {error}") from error


def constrain(manager: pluggy.PluginManager, request: Request, tokenizer: Any) -> None:
    """Have a plugin constrain a request that asks for structured outputs; does nothing for others.

    Raises:
        ConfigError: no plugin does, or one lacks something it needs.
        InvalidRequestError: they can't be kept to; the message says why.
        PluginError: a plugin raised something else.
    """
    if request.params.structured_outputs is None:
        return
    caller = manager.hook.constrain_request
    try:
        request.constraint = caller(request=request, tokenizer=tokenizer)
    except HFPagedError:
        raise
    except Exception as error:
        name = _culprit(caller, error)
        raise PluginError(f"plugin {name!r} failed in constrain_request: {type(error).__name__}: {error}") from error
    if request.constraint is None:
        raise ConfigError("structured_outputs needs a structured-output plugin, and none is loaded")


def notify(manager: pluggy.PluginManager, hook: str, **arguments: Any) -> None:
    """Tell every plugin that something happened. One that raises is logged, and keeps no other from hearing."""
    for impl in reversed(getattr(manager.hook, hook).get_hookimpls()):
        try:
            impl.function(*[arguments[name] for name in impl.argnames])
        except Exception:
            logger.exception("plugin %r raised in %s", impl.plugin_name, hook)


def _culprit(caller: pluggy.HookCaller, error: BaseException) -> str:
    """The plugin whose function an exception came out of: the innermost one, for wrappers hand on what others raise."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        for impl in caller.get_hookimpls():
            if _runs(impl.function, frame):
                return impl.plugin_name
    return "unknown"


def _who_answered(caller: pluggy.HookCaller, answer: Any, arguments: dict[str, Any]) -> str:
    """The plugin that gave the first result of a hook, found by asking again."""
    for impl in reversed(caller.get_hookimpls()):
        if not (impl.wrapper or impl.hookwrapper) and impl.function(*map(arguments.get, impl.argnames)) == answer:
            return impl.plugin_name
    return "unknown"


def _runs(function: Any, frame: types.FrameType) -> bool:
    """Whether a frame is a call of this function; of two objects of one class, whether it is this object's."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    owner = getattr(function, "__self__", None)
    return frame.f_code is code and (owner is None or frame.f_locals.get(code.co_varnames[0]) is owner)


class _Guarded:
    """An observer that is dropped when it raises."""

    def __init__(self, observer: StepObserver) -> None:
        self._observer: StepObserver | None = observer

    def __call__(self, stats: StepStats) -> None:
        if self._observer is None:
            return
        try:
            self._observer(stats)
        except Exception:
            logger.exception("step observer %r raised and is dropped", self._observer)
            self._observer = None


def _into(known: dict[str, Any], what: str) -> Callable[[str, Any], None]:
    def register(name: str, value: Any) -> None:
        if name in known:
            raise PluginError(f"the {what} {name!r} is registered twice")
        known[name] = value

    return register


def _bundled(name: str) -> Any:
    """A bundled plugin: a top-level package once installed, a folder beside hf_paged in a checkout."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = Path(__file__).resolve().parent.parent
        if error.name != name or not (root / "plugins" / name).is_dir():
            raise
        sys.path += [str(root / "plugins"), str(root / "kernels")]  # bundled plugins may import the kernels
        return importlib.import_module(name)
