"""`hf-paged bench serve`: load a running server, and tell what it was like for its clients."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hf_paged.arguments import at_least_one, number
from hf_paged.bench import report, workloads
from hf_paged.bench.load import arrivals, figures, plot, target
from hf_paged.bench.load.client import Timed, complete
from hf_paged.errors import ConfigError

if TYPE_CHECKING:
    import aiohttp

KEY = "HF_PAGED_API_KEY"
ROWS = {
    "ttft": "to the first token",
    "inter_token": "between tokens",
    "tpot": "a token, by request",
    "e2e": "end to end",
}


def add_parser(subparsers: Any) -> None:
    """Add the command to `hf-paged bench`."""
    parser = subparsers.add_parser(
        "serve",
        help="latency and throughput of a running OpenAI-compatible server",
        description="Send completions to a running server (hf_paged, vLLM or another), streamed, prompts as token ids. "
        "Without --rate and --concurrency all are sent at once. The last line on stdout is JSON.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="the name to ask for (default: the first that the server lists)")
    parser.add_argument("--api-key", default=os.environ.get(KEY), help=f"default: the environment variable {KEY}")
    rate = number("requests a second, above 0 (inf: all at once)", lambda value: value > 0)
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--rate", type=rate, metavar="R", help="open loop: Poisson arrivals, R requests a second")
    loop.add_argument("--concurrency", type=at_least_one, metavar="N", help="closed loop: N requests at a time")
    parser.add_argument(
        "--workload", default="random", help="random, A, cpu, or a file of JSON lines (default: random)"
    )
    parser.add_argument("--prompt-len", type=_length, default=(512, 512), metavar="N[-M]", help="random: default 512")
    parser.add_argument("--output-len", type=_length, default=(128, 128), metavar="N[-M]", help="random: default 128")
    parser.add_argument("--requests", type=at_least_one, metavar="N", help="how many (default: 256, or the workload's)")
    parser.add_argument(
        "--vocab-size", type=at_least_one, help="ids of random and A lie below (default: 32000; A: 128256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths, ids and arrivals (default: 0)")
    parser.add_argument(
        "--warmup", type=int, default=4, metavar="N", help="requests sent before, not counted (default: 4)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a request may take (600)")
    parser.add_argument(
        "--stop-at-eos", action="store_true", help="don't send ignore_eos, which OpenAI's own API refuses"
    )
    parser.add_argument("--slo", metavar="ttft=S,tpot=S,e2e=S", help="what counts as served well, for the goodput")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the run")
    report.add_json(parser)
    parser.add_argument("--allow-remote", action="store_true", help="load a server on another machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the server and print the figures. Exit status 1 if no request was served."""
    for what, library in {"bench serve": "aiohttp", **({"--plot": "matplotlib"} if args.plot else {})}.items():
        if find_spec(library) is None:
            raise ConfigError(
                f"{what} needs {library}, which isn't installed: pip install '.[bench]' in a clone of hf_paged"
            )
    objective = figures.Objective.parse(args.slo)
    target.check_local(args.url, args.allow_remote)
    workload = choose(args)
    began, cpu = time.perf_counter(), time.process_time()
    requests, model = asyncio.run(load(args, workload))
    busy = (time.process_time() - cpu) / (time.perf_counter() - began)
    summary = {
        "benchmark": "serve",
        "url": args.url,
        "model": model,
        "workload": workload.name,
        "load": _load_of(args),
        **figures.summarise(requests, objective),
        "client": _client(requests, busy),
        "environment": report.client(),
    }
    show(summary, Console(stderr=True))
    if args.plot:
        plot.draw(requests, summary, args.plot)
    report.write(summary, args.json)
    return 0 if summary["completed"] else 1


def choose(args: argparse.Namespace) -> workloads.Workload:
    """The workload that the arguments ask for, cut to the number of requests."""
    if args.workload == "random":
        ids, r = args.vocab_size or 32000, random.Random(args.seed)
        prompt, output = args.prompt_len, args.output_len
        items = [
            workloads.Item([r.randrange(ids) for _ in range(r.randint(*prompt))], r.randint(*output))
            for _ in range(args.requests or 256)
        ]
        lengths = ("-".join(map(str, sorted({*span}))) for span in (prompt, output))
        return workloads.Workload("random " + "/".join(lengths), items)
    # The server knows its vocabulary; ids that it doesn't have are its error to report.
    size = (args.vocab_size or 128256) if args.workload == "A" else sys.maxsize
    workload = workloads.load(args.workload, size)
    return workloads.Workload(workload.name, workload.items[: args.requests])


async def load(args: argparse.Namespace, workload: workloads.Workload) -> tuple[list[Timed], str]:
    """Send every request of a workload. Returns what became of each, and the model's name."""
    import aiohttp

    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    )
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    connector = aiohttp.TCPConnector(limit=0)  # as many connections as there are requests in flight
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        model = await target.model_name(session, args.url, args.model)
        # Written before the clock starts: the client has nothing to do then but to send and to listen.
        bodies = [_body(item, model, args) for item in workload.items]
        for item in workload.items[: args.warmup]:  # backwards, so that no prefix cache knows what is to come
            other = workloads.Item(item.prompt_token_ids[::-1], min(item.max_tokens, 8))
            await complete(session, f"{args.url}/v1/completions", _body(other, model, args), Timed(0.0, 0))
        return await _run(session, args, workload, bodies), model


async def _run(
    session: aiohttp.ClientSession, args: argparse.Namespace, workload: workloads.Workload, bodies: list[bytes]
) -> list[Timed]:
    sent: list[Timed] = []

    async def send(number: int, due: float) -> None:
        timed = Timed(due, len(workload.items[number].prompt_token_ids))
        sent.append(timed)
        await complete(session, f"{args.url}/v1/completions", bodies[number], timed)

    if args.concurrency:
        await arrivals.closed_loop(len(bodies), args.concurrency, send)
    else:
        await arrivals.open_loop(len(bodies), args.rate or float("inf"), args.seed, send)
    return sent


def _body(item: workloads.Item, model: str, args: argparse.Namespace) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "prompt": item.prompt_token_ids,
        "max_tokens": item.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body if args.stop_at_eos else body | {"ignore_eos": True}).encode()


def show(summary: dict[str, Any], console: Console) -> None:
    """Print the figures as a table."""
    served = f"{summary['completed']} of {summary['requests']} served in {summary['seconds']:.1f} s"
    title = f"{summary['workload']}: {served}, {summary['output_tokens_per_second']:,.1f} output tokens/s"
    rows = [
        [words, *map(figures.milliseconds, summary[name].values())]
        for name, words in ROWS.items()
        if summary[name] is not None
    ]
    console.print(report.table(title, ("milliseconds", "mean", *figures.SHARES, "max"), rows))
    if any(summary["slo"].values()):
        console.print(
            f"goodput: {summary['goodput']['requests_per_second']:.2f} requests/s ({summary['goodput']['share']:.1%})"
        )
    for error, count in summary["errors"].items():
        console.print(f"{count} times: {error}", style="red", markup=False)
    if summary["client"]["cpu_share"] > 0.8:
        console.print("this client used most of a core: it may have been slower than the server", style="red")


def _client(requests: list[Timed], busy: float) -> dict[str, float]:
    """How the client itself did: near a whole core, or much too late, it was what was measured."""
    late = max(timed.sent - timed.start for timed in requests)
    return {"cpu_share": round(busy, 3), "most_late": round(late, 4)}


def _load_of(args: argparse.Namespace) -> dict[str, Any]:
    """How requests arrived; a rate of None: all at once."""
    if args.concurrency:
        return {"loop": "closed", "concurrency": args.concurrency}
    return {"loop": "open", "rate": None if args.rate in (None, float("inf")) else args.rate}


def _length(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not low.isdigit() or (high and not high.isdigit()) or not 1 <= int(low) <= int(high or low):
        raise argparse.ArgumentTypeError(f"must be N or N-M with 1 <= N <= M, got {text!r}")
    return int(low), int(high or low)
