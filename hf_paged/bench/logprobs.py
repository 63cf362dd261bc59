"""`hf-paged bench logprobs`: how far half precision moves the log-probabilities of a fixed continuation, by engine.

The same weights are run in float32 by stock Transformers; how far stock in half precision is from that tells what to
expect. hf_paged is made to generate the continuation, so that its prefill, decode steps and graphs are all in it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from hf_paged.arguments import add_model_options, add_options, at_least_one, paged_options
from hf_paged.bench import models, report
from hf_paged.bench.workloads import greedy
from hf_paged.errors import ConfigError
from hf_paged.llm import LLM
from hf_paged.request import Request, Sampled


def add_parser(subparsers: Any) -> None:
    """Add the command to `hf-paged bench`."""
    parser = subparsers.add_parser(
        "logprobs",
        help="log-probabilities in half precision against float32, hf_paged's beside stock's",
        description="Score random continuations in half precision, by stock Transformers and by hf_paged, and compare "
        "with stock in float32 on the same weights. The last line on stdout is JSON.",
    )
    parser.add_argument("--model", help="name or directory (default: a random 8B model)")
    add_model_options(parser)
    parser.add_argument("--requests", type=at_least_one, default=32, help="default: %(default)s")
    parser.add_argument("--prompt-len", type=at_least_one, default=256, help="default: %(default)s")
    parser.add_argument("--output-len", type=at_least_one, default=64, help="default: %(default)s")
    add_options(parser)
    report.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score with each, and print how far they are from float32.

    Raises:
        ConfigError: the model is not in half precision.
    """
    model, name = models.load_or_8b(args)
    if model.dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(f"the model is in {model.dtype}; give --dtype bfloat16 or float16, to compare with float32")
    environment = report.environment(model, name)
    rows = _rows(args.requests, args.prompt_len + args.output_len, models.vocabulary(model))
    found = {
        "stock": stock(model, rows, args.prompt_len),
        "hf_paged": generated(model, rows, args.prompt_len, paged_options(args.option)),
    }
    exact = stock(model.float(), rows, args.prompt_len)
    errors = {engine: _errors(got, exact) for engine, got in found.items()}
    summary = {
        "benchmark": "logprobs",
        "requests": args.requests,
        "prompt_tokens": args.prompt_len,
        "output_tokens": args.output_len,
        "from_float32": errors,
        "environment": environment,
    }
    cells = [[engine, *(f"{value:.4g}" for value in found.values())] for engine, found in errors.items()]
    title = "absolute differences of log-probabilities from float32"
    Console().print(report.table(title, ("engine", "mean", "p99", "max"), cells))
    report.write(summary, args.json)
    return 0


@torch.no_grad()
def stock(model: Any, rows: Sequence[list[int]], prompt: int) -> torch.Tensor:
    """Log-probabilities of what follows each row's prompt, by a plain forward a row: float32 [rows, new tokens]."""
    scored = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits[0, prompt - 1 : -1].float()
        scored.append(logits.log_softmax(-1).gather(-1, ids[0, prompt:, None])[:, 0].cpu())
    return torch.stack(scored)


def generated(model: Any, rows: Sequence[list[int]], prompt: int, paged: dict[str, Any]) -> torch.Tensor:
    """The same by hf_paged, all rows at once, each made to generate its continuation."""
    params = greedy(len(rows[0]) - prompt)
    forced = _Forced()
    with LLM(model, skip_tokenizer_init=True, **paged) as llm:
        engine = llm.engine()[0].engine
        requests = [Request(str(i), row[:prompt], params, sampler=forced) for i, row in enumerate(rows)]
        forced.wanted = dict(zip(requests, rows, strict=True))
        engine.run(requests)
    return torch.stack([torch.stack(forced.scored[request]) for request in requests]).cpu()


class _Forced:
    """A sampler that chooses what it was told to, and keeps its log-probability."""

    def __init__(self) -> None:
        self.wanted: dict[Request, list[int]] = {}
        self.scored: dict[Request, list[torch.Tensor]] = {}

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> Sampled:
        chosen = [self.wanted[request][request.num_tokens] for request in requests]
        scores = logits.float().log_softmax(-1)
        for request, row, token in zip(requests, scores, chosen, strict=True):
            self.scored.setdefault(request, []).append(row[token])
        return Sampled(chosen)


def _rows(count: int, length: int, vocabulary: int) -> list[list[int]]:
    ids = random.Random(0)
    return [[ids.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def _errors(got: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    off = (got - exact).abs().flatten().double()
    figures = {"mean": off.mean(), "p99": off.quantile(0.99), "max": off.max()}
    return {name: float(f"{float(value):.4g}") for name, value in figures.items()}
