"""Building an engine over a Transformers model: plugins, backend, proof, engine."""

from __future__ import annotations

import dataclasses
import logging

import pluggy
from transformers import PreTrainedModel

from hf_paged import plugins
from hf_paged.config import PagedConfig
from hf_paged.engine.engine import Engine
from hf_paged.hf.spec import flat_model
from hf_paged.hf.verify import verify
from hf_paged.types import CompletionOutput, EngineInfo, Reject, Request, RequestOutput

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Built:
    """An engine, and the plugins that hear of its end."""

    engine: Engine
    info: EngineInfo
    manager: pluggy.PluginManager

    def close(self, error: BaseException | None = None) -> None:
        """Close the engine and tell the plugins."""
        self.engine.close()
        try:
            self.manager.hook.engine_stopped(info=self.info, error=error)
        except Exception:
            logger.exception("a plugin raised in engine_stopped")


def build(model: PreTrainedModel, config: PagedConfig, manager: pluggy.PluginManager, seed: int | None = None) -> Built:
    """An engine over a model, after the two were seen to agree.

    Raises:
        UnsupportedModelError: the model can't be carried; the message says why.
        ConfigError: an option is wrong for this model or machine.
        PluginError: a plugin raised.
    """
    found = plugins.registry(manager, config)
    scheduler = found.schedulers[plugins.pick("scheduler", config.scheduler, found.schedulers)]
    policy = found.policies[plugins.pick("cache_policy", config.cache_policy, found.policies)]
    if config.attention_backend is not None:
        plugins.pick("attention_backend", config.attention_backend, found.backends)
    flat = flat_model(model)
    name = plugins.choose_backend(manager, found, config, flat.spec)
    backend = found.backends[name](flat.spec)
    engine = Engine(
        flat,
        backend,
        config,
        scheduler=scheduler,
        policy=policy(),
        processors=found.processors,
        observers=found.observers,
        admit=lambda request: _admit(manager, engine, request),
        finished=lambda request: _finished(manager, request),
        seed=seed,
    )
    verify(model, flat, backend)  # what is wrong with an option is said before
    info = EngineInfo(type(model).__name__, config, name, config.scheduler, dict(plugins.loaded(manager)))
    plugins.call(manager, "engine_started", info=info)
    return Built(engine, info, manager)


def _admit(manager: pluggy.PluginManager, engine: Engine, request: Request) -> Reject | None:
    return manager.hook.admit_request(request=request, stats=engine.stats)


def _finished(manager: pluggy.PluginManager, request: Request) -> None:
    try:
        manager.hook.request_finished(request=request, output=output_of(request))
    except Exception:
        logger.exception("a plugin raised in request_finished")


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
