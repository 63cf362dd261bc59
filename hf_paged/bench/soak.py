"""`hf-paged bench soak`: very many short requests, some cancelled; whether answers stay right and memory stays flat.

A model of a few layers is given, over and over, one of a set of prompts, to generate a random number of tokens. What
each prompt's answer is was found out before, alone. Requests come as fast as others end, and some are cancelled.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
from rich.console import Console
from tqdm import tqdm

from hf_paged.arguments import add_model_options, add_options, at_least_one, number, paged_options
from hf_paged.bench import models, report
from hf_paged.bench.workloads import greedy
from hf_paged.engine.engine import Engine
from hf_paged.hf.load import model_for, pick_device
from hf_paged.llm import LLM
from hf_paged.request import Request

PROMPTS, LONGEST_PROMPT, LONGEST_OUTPUT = 64, 96, 48
SAMPLES = 20  # of memory
FLAT = 1.02  # the most that the last sample may be of the largest of the first half: allocators are never quite still
SLACK = 32 * 2**20  # bytes


def add_parser(subparsers: Any) -> None:
    """Add the command to `hf-paged bench`."""
    parser = subparsers.add_parser(
        "soak",
        help="tens of thousands of short requests, some cancelled: answers, blocks and memory",
        description="Run very many requests of random lengths, cancel some, compare every answer with that of its "
        "prompt alone, and watch blocks and memory. Exit status 1 if one was wrong, lost or leaked. In half precision "
        "answers depend on the batch, but for --option deterministic=true. The last line on stdout is JSON.",
    )
    parser.add_argument("--model", help=f"name or directory (default: {models.TINY_LLAMA}, in float32)")
    add_model_options(parser)
    parser.add_argument("--requests", type=at_least_one, default=20_000, help="default: %(default)s")
    parser.add_argument("--in-flight", type=at_least_one, default=200, help="requests at a time (default: %(default)s)")
    share = number("a share between 0 and 1", lambda value: 0 <= value <= 1)
    parser.add_argument("--cancel", type=share, default=0.1, help="share of them cancelled (default: %(default)s)")
    add_options(parser)
    report.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the requests; exit status 1 if anything was not as it has to be."""
    console = Console(stderr=True)
    if args.model:
        model, name = model_for(args.model, args.device, args.dtype), args.model
    else:
        model, name = models.tiny_llama(pick_device(args.device), args.dtype), models.TINY_LLAMA
    # Few enough blocks that requests are preempted.
    blocks = max(16, args.in_flight * (LONGEST_PROMPT + LONGEST_OUTPUT) // 3 // 16)
    options = {"num_blocks": blocks, **paged_options(args.option)}
    with LLM(model, skip_tokenizer_init=True, **options) as llm:
        llm.warm_up()
        engine = llm.engine()[0].engine
        soak = Soak(engine, args.in_flight, args.cancel)
        began = time.perf_counter()
        soak.run(args.requests)
        seconds = time.perf_counter() - began
        stats = engine.stats
    summary = {
        "benchmark": "soak",
        "requests": args.requests,
        "finished": soak.finished,
        "cancelled": soak.cancelled,
        "wrong": soak.wrong,
        "failed": soak.failed,
        "lost": args.requests - soak.finished - soak.cancelled - soak.failed,
        "preemptions": stats.num_preemptions,
        "blocks": stats.num_blocks,
        "blocks_leaked": stats.num_blocks - stats.num_free,
        "memory_mib": {what: [round(x / 2**20, 1) for x in seen] for what, seen in soak.memory.items()},
        "flat": all(_is_flat(seen) for seen in soak.memory.values()),
        "tokens": soak.tokens,
        "seconds": round(seconds, 1),
        "environment": report.environment(model, name),
    }
    good = summary["flat"] and not any(summary[x] for x in ("wrong", "failed", "lost", "blocks_leaked"))
    console.print("answers right, nothing lost or leaked, memory flat" if good else "[red]not as it has to be[/red]")
    report.write(summary, args.json)
    return 0 if good else 1


class Soak:
    """Keeps an engine busy, and counts.

    Args:
        engine: with no other requests.
        in_flight: requests at a time.
        cancel: the share of them that is cancelled, each after a random number of tokens.
    """

    def __init__(self, engine: Engine, in_flight: int, cancel: float) -> None:
        self._engine = engine
        self._in_flight = in_flight
        self._cancel = cancel
        self._random = random.Random(0)
        self._prompts = self._make_prompts()
        self._cancel_at: dict[Request, int] = {}
        self.finished = self.cancelled = self.wrong = self.failed = self.tokens = 0
        self.memory: dict[str, list[int]] = {"host": []}
        if engine.model.spec.device.type == "cuda":
            self.memory["device"] = []
        self._answers = [self._alone(prompt) for prompt in tqdm(self._prompts, "answers alone", unit="req")]

    def run(self, count: int) -> None:
        """Run `count` requests."""
        waiting = self._requests(count)
        running: set[Request] = set()
        every = max(1, count // SAMPLES)
        ended = 0
        with tqdm(total=count, unit="req") as bar:
            while True:
                while len(running) < self._in_flight and (request := next(waiting, None)) is not None:
                    running.add(request)
                    self._engine.add(request)
                if not self._engine.has_work:  # requests still in `running` were lost
                    return
                self._engine.step()
                self._cancel_some(running)
                for request in [request for request in running if request.finished]:
                    running.remove(request)
                    self._count(request)
                    ended += 1
                    bar.update()
                    if ended % every == 0:
                        self._sample()

    def _cancel_some(self, running: set[Request]) -> None:
        for request in running:
            if not request.finished and request.num_output >= self._cancel_at.get(request, LONGEST_OUTPUT + 1):
                self._engine.abort(request)

    def _requests(self, count: int) -> Iterator[Request]:
        for index in range(count):
            which = self._random.randrange(PROMPTS)
            params = greedy(self._random.randint(1, LONGEST_OUTPUT))
            request = Request(f"{index}/{which}", list(self._prompts[which]), params)
            if self._random.random() < self._cancel:
                self._cancel_at[request] = self._random.randrange(LONGEST_OUTPUT)
            yield request

    def _count(self, request: Request) -> None:
        self._cancel_at.pop(request, None)
        which = int(request.request_id.partition("/")[2])
        output = request.output_token_ids
        self.tokens += len(output)
        if request.finish_reason == "error":
            self.failed += 1
        elif request.finish_reason == "abort":
            self.cancelled += 1
        else:
            self.finished += 1
            self.wrong += len(output) != request.params.max_tokens
        self.wrong += output != self._answers[which][: len(output)]

    def _alone(self, prompt: Sequence[int]) -> list[int]:
        request = Request("alone", list(prompt), greedy(LONGEST_OUTPUT))
        self._engine.run([request])
        self._engine.forget()
        return list(request.output_token_ids)

    def _make_prompts(self) -> list[list[int]]:
        """Of random lengths; every fourth begins as another one."""
        vocabulary = self._engine.model.vocab_size
        prompts: list[list[int]] = []
        for index in range(PROMPTS):
            length = self._random.randint(1, LONGEST_PROMPT)
            shared = prompts[-1][: length // 2] if index % 4 == 3 else []
            prompts.append([*shared, *(self._random.randrange(vocabulary) for _ in range(length - len(shared)))])
        return prompts

    def _sample(self) -> None:
        self.memory["host"].append(psutil.Process().memory_info().rss)
        if "device" in self.memory:
            self.memory["device"].append(torch.cuda.memory_allocated(self._engine.model.spec.device))


def _is_flat(seen: Sequence[int]) -> bool:
    half = seen[: len(seen) // 2]
    return not half or seen[-1] <= max(max(half) * FLAT, max(half) + SLACK)
