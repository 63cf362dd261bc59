"""Compare two checkouts on one GPU: both hold a model of Llama-3.1-8B's shape, and take turns run by run.

    python tools/compare_trees.py BEFORE AFTER --json FILE

BEFORE and AFTER are folders with a checkout each (`git worktree add`). Needs some 120 GiB of GPU memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RUNS = {
    "B": 5,
    "C": 3,
    "D": 4,
    "E": 6,
    "D generate": 4,
    "D processor": 8,
    "64 threads": 20,
    "20 short calls": 9,
    "A": 2,
}
POOLS = 36 << 30, 8 << 30  # bytes of KV memory for LLM and for generate()


def main() -> None:
    """Run the comparison, print a line for each work, and write all seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs=2, type=Path, metavar="TREE")
    parser.add_argument("--works", default=",".join(RUNS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    workers = [_start(tree) for tree in args.trees]
    found: dict[str, list[list[float]]] = {}
    for work in args.works.split(","):
        for worker in workers:
            _ask(worker, work)  # what is of first use in it
        seconds: list[list[float]] = [[], []]
        for run in range(RUNS[work]):
            for index in (0, 1) if run % 2 else (1, 0):
                seconds[index].append(_ask(workers[index], work))
        found[work] = seconds
        before, after = map(statistics.median, seconds)
        print(f"{work:15} before {before:.4f} s, after {after:.4f} s: {after / before:.4f}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"seconds": found, "environment": _environment()}))
    for worker in workers:
        worker.communicate()


def _start(tree: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(str(tree / part) for part in (".", "kernels", "plugins"))
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({__file__!r})['serve']()"]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert worker.stdout is not None
    if worker.stdout.readline().strip() != "ready":
        raise SystemExit(f"{tree}: the worker died")
    return worker


def _ask(worker: subprocess.Popen[str], work: str) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(work + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def _environment() -> dict[str, Any]:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), **versions}


def serve() -> None:
    """The worker of one tree: reads the names of works, and answers with the seconds that each took."""
    import torch
    from transformers import LogitsProcessor

    import hf_paged
    from hf_paged.bench.models import llama_8b_shape
    from hf_paged.bench.workloads import UNIFORM, Item, ragged

    model = llama_8b_shape(torch.device("cuda"))
    llm = hf_paged.LLM(model, skip_tokenizer_init=True, kv_memory=POOLS[0])
    llm.warm_up()
    hf_paged.patch(model, keep_pool=True, kv_memory=POOLS[1], on_unsupported="error")
    seeds = iter(range(10**6))

    class Mine(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, 5] -= 1.0
            return scores

    def prompts(rows: int, width: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(next(seeds))
        return torch.randint(1000, 120_000, (rows, width), generator=generator).to(model.device)

    def generate(ids: torch.Tensor, new: int, **more: Any) -> None:
        fixed = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **more)

    def threads() -> Callable[[], None]:
        calls = [threading.Thread(target=generate, args=(prompts(1, 128), 16)) for _ in range(64)]

        def run() -> None:
            for call in calls:
                call.start()
            for call in calls:
                call.join()

        return run

    def requests(items: Any) -> Callable[[], Any]:
        shared = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        params = [hf_paged.SamplingParams(max_tokens=item.max_tokens, **shared) for item in items]
        return lambda: llm.generate([item.prompt_token_ids for item in items], params, use_tqdm=False)

    def uniform(name: str) -> list[Item]:
        return UNIFORM[name].items(128_256, next(seeds))

    def short(ids: torch.Tensor) -> None:
        for _ in range(20):
            generate(ids, 2)

    works: dict[str, Callable[[], Callable[[], Any]]] = {
        "A": lambda: requests(ragged().items),
        **{name: lambda name=name: requests(uniform(name)) for name in UNIFORM},
        "D generate": lambda: partial(generate, prompts(64, 512), 256),
        "D processor": lambda: partial(generate, prompts(64, 512), 256, logits_processor=[Mine()]),
        "64 threads": threads,
        "20 short calls": lambda: partial(short, prompts(1, 16)),
    }
    print("ready", flush=True)
    for line in sys.stdin:
        work = works[line.strip()]()
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
