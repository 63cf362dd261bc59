"""Building an engine over a Transformers model: plugins, backend, engine, proof."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import pluggy
from transformers import PreTrainedModel

from hf_paged import plugins
from hf_paged.config import PagedConfig
from hf_paged.engine.engine import Engine
from hf_paged.engine.staging import on_device
from hf_paged.errors import ConfigError
from hf_paged.hf.adopt import adopt
from hf_paged.hf.fusion.fusion import Fusion, release
from hf_paged.hf.spec import flat_model
from hf_paged.request import CompletionOutput, Reject, Request, RequestOutput
from hf_paged.stats import EngineInfo


@dataclasses.dataclass
class Built:
    """An engine, and the plugins that hear of its end.

    Attributes:
        fusion: the fused forwards of its steps, or None.
        unfused: why there are none, or None.
    """

    engine: Engine
    info: EngineInfo
    manager: pluggy.PluginManager
    fusion: Fusion | None = None
    unfused: str | None = None

    def __post_init__(self) -> None:
        # Called once: when the engine is told to stop, or when it is gone, with the LLM that nobody closed.
        # The fusion is held: of an LLM that is collected in a cycle, weak references to it are dead already.
        self._releases = weakref.finalize(self, release, self.fusion) if self.fusion is not None else None
        if self._releases is not None:
            self._releases.atexit = False

    def close(self, error: BaseException | None = None) -> None:
        """Close the engine and tell the plugins."""
        self.engine.close()
        self.tell_stopped(error)

    def tell_stopped(self, error: BaseException | None = None) -> None:
        """Tell the plugins that the engine, which its thread closes, has stopped; take its fused forwards off."""
        self.forsake()
        plugins.notify(self.manager, "engine_stopped", info=self.info, error=error)

    def forsake(self) -> None:
        """Take the engine's fused forwards off. All that is left to do of an engine that a fork left behind."""
        if self._releases is not None:
            self._releases()
        self.fusion = None


def build(
    model: PreTrainedModel,
    config: PagedConfig,
    manager: pluggy.PluginManager,
    found: plugins.Registry,
    seed: int | None = None,
) -> Built:
    """An engine over a model, after the two were seen to agree.

    Args:
        model: the live module.
        config: the engine's options.
        manager, found: the plugins, and what they registered.
        seed: of the engine's own sampler.

    Raises:
        UnsupportedModelError: the model can't be carried; the message says why.
        ConfigError: an option is wrong for this model or machine.
        PluginError: a plugin raised.
    """
    flat = flat_model(model)
    name = plugins.choose_backend(manager, found, config, flat.spec)
    backend = plugins.made("attention backend", name, found.backends[name], flat.spec)
    offers = getattr(backend, "deterministic", False) and getattr(backend, "kernels", None) is not None
    if config.deterministic and not offers:
        raise ConfigError(f"deterministic=True, which the attention backend {name!r} doesn't offer")
    admission = _Admission(manager)
    engine = Engine(
        flat,
        backend,
        config,
        scheduler=found.schedulers[config.scheduler],
        policy=plugins.made("cache policy", config.cache_policy, found.policies[config.cache_policy]),
        processors=found.processors,
        observers=found.observers,
        admit=admission,
        finished=lambda request: plugins.notify(
            manager, "request_finished", request=request, output=output_of(request)
        ),
        seed=seed,
    )
    admission.engine = weakref.ref(engine)
    with on_device(flat.spec.device):  # what is wrong with an option is said before
        unfused = adopt(model, flat, backend, config)
    info = EngineInfo(type(model).__name__, config, name, config.scheduler, dict(plugins.loaded(manager)))
    built = Built(engine, info, manager, flat.fusion, unfused)
    try:
        plugins.call(manager, "engine_started", info=info)
    except BaseException as error:
        built.close(error)
        raise
    return built


class _Admission:
    """Asks the plugins whether a request is taken. Doesn't hold the engine, which holds this."""

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._manager = manager
        self.engine: Callable[[], Engine | None] = lambda: None

    def __call__(self, request: Request) -> Reject | None:
        engine = self.engine()
        assert engine is not None  # it is the one that asks
        return self._manager.hook.admit_request(request=request, stats=engine.stats)


def output_of(request: Request) -> RequestOutput:
    """What came of a request, without text."""
    completion = CompletionOutput(
        index=0,
        text="",
        token_ids=request.output_token_ids,
        cumulative_logprob=request.cumulative_logprob,
        logprobs=request.logprobs,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
    return RequestOutput(
        request_id=request.request_id,
        prompt=None,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[completion],
        finished=request.finished,
        prompt_logprobs=request.prompt_logprobs,
        metrics=request.metrics,
        num_cached_tokens=request.num_cached or 0,
    )
