"""The engines that are compared. Each is opened, warmed and closed around its run, so that none profits from another.

An engine is a context manager made by a function `(model, options)`: entering it prepares everything that a server
would prepare before its first request, and gives a function from requests to a Run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hf_paged.bench import static
from hf_paged.bench.run import KVUse, Run, written
from hf_paged.bench.workloads import Item
from hf_paged.errors import ConfigError, HFPagedError
from hf_paged.hf import compat
from hf_paged.hf.patch import paged
from hf_paged.llm import LLM

Serve = Callable[[Sequence[Item]], Run]

# Transformers' continuous batching sizes its cache by the GPU's memory and dies with a MemoryError on CPU.
BATCHING_ON_CPU = {"num_blocks": 64, "max_batch_tokens": 512}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the engines can be told.

    Attributes:
        batch_size: rows of a static batch.
        paged: options of hf_paged, as `hf_paged.PagedConfig` has them.
        batching: options of Transformers' ContinuousBatchingConfig; on CPU they go on top of BATCHING_ON_CPU.
    """

    batch_size: int = 8
    paged: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batching: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@contextmanager
def hf_paged_engine(model: Any, options: Options) -> Iterator[Serve]:
    """`hf_paged.LLM` over the live model."""
    with LLM(model, skip_tokenizer_init=True, **options.paged) as llm:
        llm.warm_up()

        def serve(items: Sequence[Item]) -> Run:
            prompts, params = [item.prompt_token_ids for item in items], [item.params for item in items]
            before, began = llm.stats, time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - began
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            return Run(seconds, tokens, KVUse.between(before, llm.stats))

        yield serve


@contextmanager
def patched_engine(model: Any, options: Options) -> Iterator[Serve]:
    """`model.generate()` of the patched model: a call for all requests of the same output length."""
    with paged(model, **{"keep_pool": True, "on_unsupported": "error", **options.paged}) as handle:

        def serve(items: Sequence[Item]) -> Run:
            before, began = handle.stats, time.perf_counter()
            outputs: dict[int, list[int]] = {}
            for length in dict.fromkeys(item.max_tokens for item in items):
                members = [index for index, item in enumerate(items) if item.max_tokens == length]
                rows, _ = static.generate(model, [items[index] for index in members], pad=0)
                outputs.update(zip(members, rows, strict=True))
            seconds = time.perf_counter() - began
            return Run(seconds, [outputs[index] for index in range(len(items))], KVUse.between(before, handle.stats))

        yield serve


@contextmanager
def generate_engine(model: Any, options: Options) -> Iterator[Serve]:
    """Stock `generate()` over static batches."""
    # Any id will do where a mask says that it is padding.
    yield lambda items: static.run(model, items, options.batch_size, pad=0)


@contextmanager
def generate_batch_engine(model: Any, options: Options) -> Iterator[Serve]:
    """Transformers' continuous batching, through the manager that `generate_batch` uses.

    `generate_batch` itself gives every request the same number of new tokens; its manager takes one for each.
    """
    settings = {**(BATCHING_ON_CPU if model.device.type == "cpu" else {}), **options.batching}
    with compat.continuous_batching(model, **settings) as manager:
        yield lambda items: _batched(manager, items)


def _batched(manager: Any, items: Sequence[Item]) -> Run:
    """Hand all requests to Transformers' batching manager, and wait for all of them.

    KV slots reserved are by its page size, from its documentation; the pool's bytes are measured.
    """
    began = time.perf_counter()
    names = [manager.add_request(item.prompt_token_ids, max_new_tokens=item.max_tokens) for item in items]
    results: dict[str, list[int]] = {}
    while len(results) < len(items):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise HFPagedError("Transformers' continuous batching died during the run; its own log says why")
        elif result.error is not None:
            raise HFPagedError(f"Transformers' continuous batching failed a request: {result.error}")
        elif result.is_finished():
            results[result.request_id] = list(result.generated_tokens)
    seconds = time.perf_counter() - began
    page, tensors = compat.continuous_batching_pool(manager)
    lengths = [written(len(item.prompt_token_ids), item.max_tokens) for item in items]
    reserved = sum(-(-length // page) * page for length in lengths)
    kv = KVUse(reserved, sum(lengths), sum(tensor.nbytes for tensor in tensors))
    return Run(seconds, [results[name] for name in names], kv)


ENGINES: dict[str, Callable[[Any, Options], AbstractContextManager[Serve]]] = {
    "hf_paged": hf_paged_engine,
    "patched": patched_engine,
    "generate": generate_engine,
    "generate_batch": generate_batch_engine,
}


def pick(what: str, names: Sequence[str], known: Iterable[str] = ENGINES) -> list[str]:
    """The names of engines or the like, from arguments that may hold several, comma separated; each once, in order.

    Raises:
        ConfigError: one is unknown.
    """
    found = [name for argument in names for name in argument.split(",") if name]
    for name in found:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return list(dict.fromkeys(found))


def measure(name: str, model: Any, items: Sequence[Item], options: Options) -> Run:
    """Open an engine, warm it on two short requests that share nothing with the workload, run, and close it."""
    warm_up = [Item([7] * 20, 4), Item([8] * 9, 4)]
    with ENGINES[name](model, options) as serve:
        serve(warm_up)
        return serve(items)
