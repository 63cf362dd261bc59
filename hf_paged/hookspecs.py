"""The hook specifications: every way in which a plugin can change hf_paged, and nothing else.

Hooks run when a model is patched, when its engine is built, or once a request; never once a token or a layer. What has
to act in every step is an object that a hook hands over once. A plugin is any object with functions marked
`@hf_paged.hookimpl`: a module named by an entry point of the group `hf_paged`, or an object in
`PagedConfig(plugins=(…,))`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from hf_paged.batch import CacheSpec
from hf_paged.config import PagedConfig
from hf_paged.protocols import AttentionBackend, CachePolicy, Constraint, LogitsProcessor, StepObserver
from hf_paged.request import Reject, Request, RequestOutput
from hf_paged.stats import EngineInfo

if TYPE_CHECKING:
    import torch

PROJECT = "hf_paged"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def validate_config(config: PagedConfig) -> None:
    """Refuse a configuration.

    When: a model is patched or given to `LLM`, before anything else.
    Arguments: config: the engine's options, frozen.
    Return: nothing.
    Cost: once an engine.
    Failure: what it raises stops the engine from being built, and names the plugin.
    """


@hookspec
def register_attention_backends(
    register: Callable[[str, Callable[[CacheSpec], AttentionBackend]], None], config: PagedConfig
) -> None:
    """Offer attention backends.

    When: a model is patched or given to `LLM`.
    Arguments: register(name, factory): the factory takes the model's CacheSpec and returns a backend; it imports its
        kernels itself, so that a backend nobody chooses costs nothing. config: the engine's options.
    Return: nothing.
    Cost: once an engine.
    Failure: a name that is taken, or an exception, stops the engine from being built, and names the plugin.
    """


@hookspec(firstresult=True)
def select_attention_backend(spec: CacheSpec, device: torch.device, names: Sequence[str]) -> str | None:
    """Choose the attention backend, unless the config names one.

    When: an engine is built, after the backends were registered.
    Arguments: spec: the model's layers. device: where it lies. names: the registered backends.
    Return: one of the names, or None to leave the choice to the next plugin. The first answer counts.
    Cost: once an engine.
    Failure: a name that isn't registered, or an exception, stops the engine from being built, and names the plugin.
    """


@hookspec
def register_schedulers(register: Callable[[str, type], None], config: PagedConfig) -> None:
    """Offer schedulers.

    When: a model is patched or given to `LLM`.
    Arguments: register(name, cls): cls derives from hf_paged.FCFSScheduler; overriding `key` is enough for another
        order. config: the engine's options.
    Return: nothing.
    Cost: once an engine; the scheduler itself runs once a step.
    Failure: a name that is taken, or an exception, stops the engine from being built, and names the plugin.
    """


@hookspec
def register_cache_policies(register: Callable[[str, Callable[[], CachePolicy]], None], config: PagedConfig) -> None:
    """Offer orders in which cached blocks are given up.

    When: a model is patched or given to `LLM`.
    Arguments: register(name, factory): the factory returns a CachePolicy. config: the engine's options.
    Return: nothing.
    Cost: once an engine; the policy itself runs once for each block freed.
    Failure: a name that is taken, or an exception, stops the engine from being built, and names the plugin.
    """


@hookspec
def register_logits_processors(register: Callable[[LogitsProcessor], None], config: PagedConfig) -> None:
    """Change logits before a token is chosen, of every request.

    When: a model is patched or given to `LLM`.
    Arguments: register(processor): an object that processes a batch of logits on the device without a sync.
        Processors run in the order in which they were registered. config: the engine's options.
    Return: nothing.
    Cost: once an engine; the processor itself runs once a step for each sampler: the engine's own, and that of each
        `generate()` call with processors or sampling of its own, whose processors run after it.
    Failure: an exception stops the engine from being built, and names the plugin. A processor that raises in a step
        fails the requests of that step that it was called for.
    """


@hookspec
def register_step_observers(register: Callable[[StepObserver], None]) -> None:
    """Watch the steps of the engine.

    When: a model is patched or given to `LLM`.
    Arguments: register(observer): called with StepStats once a step, on the host, when the step's tokens are known. A
        step launched ahead for requests that have all ended meanwhile is dropped unseen.
    Return: nothing.
    Cost: once an engine; the observer itself runs once a step.
    Failure: an exception stops the engine from being built, and names the plugin. An observer that raises in a step is
        logged once and dropped.
    """


@hookspec
def prepare_model(model: torch.nn.Module, ledger: Any, config: PagedConfig) -> None:
    """Change the model, reversibly.

    When: a model is patched (or given to an LLM), before its layers are looked at.
    Arguments: model: the live module. ledger: hf_paged.ledger.Ledger, through which every change has to be made, so
        that unpatching undoes it. config: the engine's options.
    Return: nothing.
    Cost: once a patched model.
    Failure: what it raises undoes the changes made so far, stops the engine from being built, and names the plugin.
    """


@hookspec
def engine_started(info: EngineInfo) -> None:
    """Hear that an engine was built.

    When: once an engine, when it is ready.
    Arguments: info: what it is made of.
    Return: nothing.
    Cost: once an engine.
    Failure: what it raises stops the engine, and names the plugin.
    """


@hookspec
def engine_stopped(info: EngineInfo, error: BaseException | None) -> None:
    """Hear that an engine was closed.

    When: once an engine, after its memory was given back.
    Arguments: info: as for engine_started. error: what ended it, or None.
    Return: nothing.
    Cost: once an engine.
    Failure: what it raises is logged.
    """


@hookspec(firstresult=True)
def constrain_request(request: Request, tokenizer: Any) -> Constraint | None:
    """See to the structured outputs of a request.

    When: once a request that has `params.structured_outputs`, when `LLM` or the server has made it and before the
        engine checks it.
    Arguments: request: the request, with its parameters and end-of-sequence ids; later it may begin with output tokens
        already, which the constraint finds in `request.token_ids`. tokenizer: the model's, or None.
    Return: what keeps the request to them, and becomes `request.constraint`; a logits processor of the plugin's acts on
        it. None to leave it to the next plugin. The first answer counts; with none the request is refused.
    Cost: once such a request, in its caller's thread; compiling a grammar may take a while.
    Failure: what it raises fails that request alone; InvalidRequestError and ConfigError reach the caller as they are.
    """


@hookspec(firstresult=True)
def admit_request(request: Request, stats: Any) -> Reject | None:
    """Turn a request away.

    When: each arrival, after the request was found valid and before it is queued.
    Arguments: request: the request. stats: CacheStats of the engine.
    Return: None to let it pass, or Reject(reason, retry_after). The first Reject counts.
    Cost: once a request, in the thread that steps the engine; keep it short.
    Failure: what it raises fails that request alone.
    """


@hookspec
def request_finished(request: Request, output: RequestOutput) -> None:
    """Hear that a request ended, however it did.

    When: once a request, after its blocks were freed.
    Arguments: request: the request, with its metrics. output: its tokens and finish reason; text is left empty.
    Return: nothing.
    Cost: once a request, in the thread that steps the engine; keep it short.
    Failure: what it raises is logged; the request's outcome stays as it is.
    """


@hookspec
def register_routes(app: Any, config: Any) -> None:
    """Add routes to the server.

    When: the server starts, after its own routes.
    Arguments: app: the FastAPI application. config: the server's options.
    Return: nothing.
    Cost: once a server.
    Failure: what it raises stops the server, and names the plugin.
    """


@hookspec
def register_cli(subparsers: Any) -> None:
    """Add commands to `hf-paged`.

    When: the command line starts, after its own commands.
    Arguments: subparsers: what argparse's `add_subparsers` returned; set `run` as a default of the parser you add.
    Return: nothing.
    Cost: once a start of the command line.
    Failure: what it raises ends the command, and names the plugin.
    """
