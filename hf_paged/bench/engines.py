"""The engines that are compared. Each is opened, warmed and closed around its run, so that none profits from another.

An engine is a context manager made by a function `(model, options)`: entering it prepares everything that a server
would prepare before its first request, and gives a function from requests to a Run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hf_paged.bench import static
from hf_paged.bench.kv import KVUse, between, written
from hf_paged.bench.run import Run
from hf_paged.bench.workloads import Item
from hf_paged.errors import ConfigError, HFPagedError
from hf_paged.hf import compat
from hf_paged.hf.handle import patched
from hf_paged.hf.patch import paged
from hf_paged.llm import LLM
from hf_paged.params import SamplingParams

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
    llm = LLM(model, skip_tokenizer_init=True, **options.paged)
    llm.warm_up()

    def serve(items: Sequence[Item]) -> Run:
        params = [
            SamplingParams(temperature=0.0, max_tokens=item.max_tokens, ignore_eos=True, detokenize=False)
            for item in items
        ]
        prompts = [{"prompt_token_ids": item.prompt_token_ids} for item in items]
        before = llm.stats
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return Run(seconds, [list(output.outputs[0].token_ids) for output in outputs], between(before, llm.stats))

    try:
        yield serve
    finally:
        llm.close()


@contextmanager
def patched_engine(model: Any, options: Options) -> Iterator[Serve]:
    """`model.generate()` of the patched model: a call for all requests of the same output length."""
    with paged(model, **{"keep_pool": True, "on_unsupported": "error", **options.paged}):
        handle = patched(model)
        assert handle is not None

        def serve(items: Sequence[Item]) -> Run:
            by_length: dict[int, list[int]] = {}
            for index, item in enumerate(items):
                by_length.setdefault(item.max_tokens, []).append(index)
            before = handle.stats
            outputs: dict[int, list[int]] = {}
            began = time.perf_counter()
            for length, members in by_length.items():
                inputs = static.left_pad([items[index].prompt_token_ids for index in members], 0, model.device)
                rows = model.generate(**inputs, **static.greedy(length, pad=0))
                outputs.update(zip(members, rows[:, -length:].tolist(), strict=True))
            seconds = time.perf_counter() - began
            return Run(seconds, [outputs[index] for index in range(len(items))], between(before, handle.stats))

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
    """Hand all requests to Transformers' batching manager, and wait for all of them."""
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
    return Run(seconds, [results[name] for name in names], _batched_kv(manager, items))


def _batched_kv(manager: Any, items: Sequence[Item]) -> KVUse:
    """Reserved by its page size, from its documentation; the pool's bytes are measured."""
    page, tensors = compat.continuous_batching_pool(manager)
    lengths = [written(len(item.prompt_token_ids), item.max_tokens) for item in items]
    pool = sum(tensor.nbytes for tensor in tensors)
    return KVUse(sum(-(-length // page) * page for length in lengths), sum(lengths), pool)


ENGINES: dict[str, Callable[[Any, Options], AbstractContextManager[Serve]]] = {
    "hf_paged": hf_paged_engine,
    "patched": patched_engine,
    "generate": generate_engine,
    "generate_batch": generate_batch_engine,
}


def pick(names: Sequence[str]) -> list[str]:
    """The engines' names, from arguments that may hold several, comma separated; each once, in order.

    Raises:
        ConfigError: one is unknown.
    """
    found = [name for argument in names for name in argument.split(",") if name]
    for name in found:
        if name not in ENGINES:
            raise ConfigError(f"unknown engine {name!r}; known are {', '.join(ENGINES)}")
    return list(dict.fromkeys(found))


def measure(name: str, model: Any, items: Sequence[Item], options: Options) -> Run:
    """Open an engine, warm it on two short requests that share nothing with the workload, run, and close it."""
    warm_up = [Item([7] * 20, 4), Item([8] * 9, 4)]
    with ENGINES[name](model, options) as serve:
        serve(warm_up)
        return serve(items)
