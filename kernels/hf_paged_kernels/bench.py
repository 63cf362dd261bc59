"""`python -m hf_paged_kernels.bench [--json FILE]`: each kernel against the limit measured in the same run.

Times are medians of CUDA-graph replays; a graph holds several launches over different data, as a captured step holds
its layers, so that neither launches nor the cache distort a kernel's time. Shares are of the larger of a device copy's
and an elementwise kernel's bandwidth, bytes read plus written; decode attention counts keys and values alone. For
comparison, attention is also timed by torch's `scaled_dot_product_attention` on dense contiguous keys and values of the
same lengths, and linear layers by cuBLAS with separate kernels for norm and activation.
"""

import argparse
import datetime
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import hf_paged_kernels as kernels

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
DTYPE = torch.bfloat16
SETTLE = 0.1  # seconds


def replay_us(run: Callable[[], object], launches: int = 1, repeats: int = 20) -> float:
    """Median microseconds of one of `launches` launches that `run` makes, replayed from a captured graph.

    It waits SETTLE first, since freeing gigabytes takes bandwidth for a few milliseconds more.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    time.sleep(SETTLE)
    measured = []
    for i in range(repeats + 3):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        torch.cuda._sleep(500_000)  # all is enqueued before the clock starts, even by a slow host
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            measured.append(begin.elapsed_time(end) * 1e3 / launches)
    return sorted(measured)[len(measured) // 2]


def times(launches: int, function: Callable[..., object], *args: Any, **kwargs: Any) -> Callable[[], None]:
    """A function that calls `function` `launches` times."""

    def run() -> None:
        for _ in range(launches):
            function(*args, **kwargs)

    return run


def rand(*shape: int) -> torch.Tensor:
    """Normally distributed numbers on the device."""
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def limits() -> dict[str, float]:
    """The machine's limits: GB/s of 2-GiB copies, TFLOP/s of an 8192-cubed bf16 product."""
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    moved = 2 * x.nbytes / 1e3
    kernel = moved / replay_us(times(1, torch.mul, x, 1.0, out=y))
    node = moved / replay_us(times(1, y.copy_, x))
    begin, end, measured = torch.cuda.Event(True), torch.cuda.Event(True), []
    for _ in range(10):
        begin.record()
        y.copy_(x)
        end.record()
        torch.cuda.synchronize()
        measured.append(begin.elapsed_time(end) * 1e3)
    eager = moved / sorted(measured)[5]
    a, b = rand(8192, 8192), rand(8192, 8192)
    product = 2 * 8192**3 / replay_us(times(1, torch.matmul, a, b)) / 1e6
    return {
        "copy_gb_s": max(kernel, node, eager),
        "copy_gb_s_eager": eager,
        "copy_gb_s_graph_node": node,
        "elementwise_gb_s": kernel,
        "matmul_tflop_s": product,
    }


def pages(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A key and a value cache with just enough blocks, and shuffled tables."""
    blocks = rows * triton.cdiv(length, PAGE) + 1
    order = torch.randperm(blocks - 1, device="cuda") + 1
    return rand(blocks, PAGE, KV_HEADS, DIM), rand(blocks, PAGE, KV_HEADS, DIM), order.view(rows, -1).int()


def result(kernel: str, case: str, us: float, *, moved: float = 0, flops: float = 0, limit: dict, **extra: Any) -> dict:
    """A line of the table: `us` microseconds for `moved` bytes or `flops` operations, and its share of the limit."""
    row = {"kernel": kernel, "case": case, "us": us, **extra}
    if flops:
        row["tflop_s"] = flops / us / 1e6
        row["share"] = row["tflop_s"] / limit["matmul_tflop_s"]
    else:
        row["gb_s"] = moved / us / 1e3
        row["share"] = row["gb_s"] / limit["copy_gb_s"]
    return row


def sdpa_us(query, key, value, launches: int = 1, **options: Any) -> float:
    """Microseconds of the faster of torch's flash and cuDNN backends; infinity if neither supports the case."""
    best = float("inf")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                run = times(1, F.scaled_dot_product_attention, query, key, value, enable_gqa=True, **options)
                best = min(best, replay_us(run, launches, repeats=8))
        except RuntimeError:
            continue
    return best


def step(layers: int, caches: list, query, table, lens, workspace, out) -> None:
    """Decode attention of `layers` layers, cycling through `caches`."""
    for i in range(layers):
        k, v, _ = caches[i % len(caches)]
        kernels.decode_attention(query, k, v, table, lens, workspace, scale=DIM**-0.5, out=out, planned=True)


def decode(limit: dict) -> Iterator[dict]:
    """Decode attention, planned once a step as in an engine; the plan's time separately."""
    for rows, length, layers in (
        (64, 1024, 8), (64, 4096, 4), (256, 1024, 4), (256, 4096, 2), (8, 2048, 8), (1, 16384, 8), (1, 1024, 8),
    ):  # fmt: skip
        moved = 2 * rows * length * KV_HEADS * DIM * 2
        sets = max(1, min(layers, 2**28 // moved))
        caches = [pages(rows, length) for _ in range(sets)]
        table = caches[0][2]  # layers share the step's table
        query, lens = rand(rows, HEADS, DIM), torch.full((rows,), length, dtype=torch.int32, device="cuda")
        size = kernels.decode_workspace_bytes(rows, HEADS, caches[0][0], caches[0][1])
        workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        out = torch.empty_like(query)
        kernels.plan_decode(lens, workspace, caches[0][0], caches[0][1])

        run = partial(step, layers, caches, query, table, lens, workspace, out)
        us = replay_us(run, layers)
        plan = replay_us(times(1, kernels.plan_decode, lens, workspace, caches[0][0], caches[0][1]))
        k, v = rand(rows, KV_HEADS, length, DIM), rand(rows, KV_HEADS, length, DIM)
        dense = sdpa_us(query.view(rows, HEADS, 1, DIM), k, v)
        yield result(
            "decode attention", f"{rows} x {length}", us, moved=moved, limit=limit, sdpa_us=dense, plan_us=plan
        )
    yield ragged(limit)


def ragged(limit: dict) -> dict:
    """One long row among many short ones, which the plan balances."""
    lens = torch.tensor([16384] + [200 + 13 * i for i in range(63)], dtype=torch.int32, device="cuda")
    k, v, _ = pages(1, int(lens.sum()) + 64 * PAGE)
    table = torch.zeros(64, 16384 // PAGE, dtype=torch.int32, device="cuda")
    order = (torch.randperm(k.shape[0] - 1, device="cuda") + 1).int()
    at = 0
    for row, length in enumerate(lens.tolist()):
        need = triton.cdiv(length, PAGE)
        table[row, :need] = order[at : at + need]
        at += need
    query = rand(64, HEADS, DIM)
    out = torch.empty_like(query)
    workspace = torch.zeros(kernels.decode_workspace_bytes(64, HEADS, k, v), dtype=torch.uint8, device="cuda")
    kernels.plan_decode(lens, workspace, k, v)

    run = partial(step, 4, [(k, v, table)], query, table, lens, workspace, out)
    moved = 2 * int(lens.sum()) * KV_HEADS * DIM * 2
    return result("decode attention", "16384 + 63 x 200..1006", replay_us(run, 4), moved=moved, limit=limit)


def prefill(limit: dict) -> Iterator[dict]:
    """Prefill from fresh contiguous keys and through block tables, and a chunk over a cached prefix."""
    for rows, length, prefix in ((16, 2048, 0), (4, 8192, 0), (1, 512, 8192), (64, 128, 0)):
        tokens = rows * length
        flops = 4 * HEADS * DIM * rows * (length * prefix + length * (length + 1) / 2)
        query, key, value = rand(tokens, HEADS, DIM), rand(tokens, KV_HEADS, DIM), rand(tokens, KV_HEADS, DIM)
        starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
        out = torch.empty_like(query)
        options = {"scale": DIM**-0.5, "out": out}
        case = f"{rows} x {length}" + (f" over {prefix}" if prefix else "")
        dense = None
        if not prefix:
            q, k, v = (x.view(rows, length, -1, DIM).transpose(1, 2) for x in (query, key, value))
            dense = sdpa_us(q, k, v, is_causal=True)
            us = replay_us(times(1, kernels.prefill_attention, query, key, value, starts, **options))
            yield result("prefill contiguous", case, us, flops=flops, limit=limit, sdpa_us=dense)
        k, v, table = pages(rows, length + prefix)
        lens = torch.full((rows,), length + prefix, dtype=torch.int32, device="cuda")
        options.update(seq_lens=lens, block_tables=table)
        us = replay_us(times(1, kernels.prefill_attention, query, k, v, starts, **options))
        yield result("prefill paged", case, us, flops=flops, limit=limit, sdpa_us=dense)
        options["window"] = 1024
        if rows == 16:  # served by the portable kernel, as soft-caps, sinks and ALiBi are
            rest = max(0, length - 1024)
            seen = flops - 4 * HEADS * DIM * rows * rest * (rest + 1) / 2
            us = replay_us(times(1, kernels.prefill_attention, query, k, v, starts, **options))
            yield result("prefill paged, window 1024", case, us, flops=seen, limit=limit)


def elementwise(limit: dict) -> Iterator[dict]:
    """Norms, rotary embedding with cache write, and the gated activation; many tokens, and a decode step's."""
    for tokens in (8192, 256):
        x, residual, weight = rand(tokens, 4096), rand(tokens, 4096), rand(4096)
        out = torch.empty_like(x)
        us = replay_us(times(4, kernels.rms_norm, x, weight, eps=1e-5, residual=residual, out=out), 4)
        yield result("rms_norm with residual", f"{tokens} x 4096", us, moved=4 * x.nbytes, limit=limit)
        us = replay_us(times(4, kernels.rms_norm, x, weight, eps=1e-5, out=out), 4)
        yield result("rms_norm", f"{tokens} x 4096", us, moved=2 * x.nbytes, limit=limit)
        merged = rand(tokens, 2 * 14336)
        gate, up = merged[:, :14336], merged[:, 14336:]
        out = torch.empty(tokens, 14336, device="cuda", dtype=DTYPE)
        us = replay_us(times(4, kernels.gated_activation, gate, up, out=out), 4)
        yield result("silu * up", f"{tokens} x 14336", us, moved=3 * out.nbytes, limit=limit)
        qkv = rand(tokens, (HEADS + 2 * KV_HEADS) * DIM)
        query, key, value = (
            part.view(tokens, -1, DIM) for part in qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
        )
        k, v, _ = pages(1, tokens)
        slots = torch.randperm(tokens, device="cuda") + PAGE
        cos, sin = torch.randn(tokens, DIM // 2, device="cuda"), torch.randn(tokens, DIM // 2, device="cuda")
        options = {"query": query, "cos": cos, "sin": sin, "query_out": torch.empty_like(query.contiguous())}
        us = replay_us(times(4, kernels.write_cache, key, value, k, v, slots, **options), 4)
        moved = 2 * qkv.nbytes + cos.nbytes + sin.nbytes
        yield result("rope + cache write", f"{tokens} x {HEADS}+2x{KV_HEADS} heads", us, moved=moved, limit=limit)


def sampling(limit: dict, vocab: int = 128256) -> Iterator[dict]:
    """Sampling from float32 logits; bytes count the logits once, however often they are read."""
    for rows in (1, 64, 256):
        logits = torch.randn(rows, vocab, device="cuda") * 3
        zero, one = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.ones(rows, device="cuda")
        top_k, out = torch.full((rows,), 50, dtype=torch.int32, device="cuda"), torch.empty_like(zero)
        options: dict[str, Any] = {"temperature": one, "seeds": zero, "positions": zero, "out": out}
        runs = {
            "argmax": times(1, kernels.argmax, logits, out=out),
            "temperature": times(1, kernels.sample, logits, **options),
            "top-k 50": times(1, kernels.sample, logits, top_k=top_k, **options),
            "top-p 0.9": times(1, kernels.sample, logits, top_p=one * 0.9, **options),
            "top-k 50, top-p 0.9": times(1, kernels.sample, logits, top_k=top_k, top_p=one * 0.9, **options),
        }
        for name, run in runs.items():
            yield result(f"sampling, {name}", f"{rows} x {vocab}", replay_us(run), moved=logits.nbytes, limit=limit)


# Llama-3.1-8B's: (rows of weight, K, normed, gated, with residual)
LAYER = {
    "qkv": (6144, 4096, True, False, False),
    "o": (4096, 4096, False, False, True),
    "gate_up": (28672, 4096, True, True, False),
    "down": (4096, 14336, False, False, True),
}
LM_HEAD = (128256, 4096, True, False, False)


def fused(x, weight, out, norm, gated: bool, residual: bool) -> None:
    """One call: the product with its norm, activation and residual add."""
    gate = "silu" if gated else None
    kernels.linear(x, weight, norm_weight=norm, eps=1e-5, gate=gate, residual=out if residual else None, out=out)


@cache
def stream(tokens: int, n: int) -> torch.Tensor:
    """A residual stream to add to."""
    return torch.zeros(tokens, n, device="cuda", dtype=DTYPE)


def apart(x, weight, out, norm, gated: bool, residual: bool) -> None:
    """The same by cuBLAS and separate kernels, as in a decoder layer; the norm does the residual add."""
    if norm is not None:
        x = kernels.rms_norm(x, norm, eps=1e-5, residual=stream(*x.shape))
    y = F.linear(x, weight)
    if gated:
        kernels.gated_activation(*y.chunk(2, -1), out=out)


def linear(limit: dict, sets: int = 8, layers: int = 32) -> Iterator[dict]:
    """Linear layers, one by one, and all of a decode step in order; the bytes counted are the weights'."""
    norm = rand(4096)
    weights = {name: [rand(n, k) * k**-0.5 for _ in range(sets)] for name, (n, k, *_) in LAYER.items()}
    head = rand(*LM_HEAD[:2]) * 4096**-0.5
    layer_bytes = sum(w[0].nbytes for w in weights.values())
    for tokens in (1, 8, 16, 32, 64, 128):
        x = {k: rand(tokens, k) for k in (4096, 14336)}
        out = {n: rand(tokens, n // 2 if gated else n) for n, _, _, gated, _ in (*LAYER.values(), LM_HEAD)}

        def call(how, shape, weight, x=x, out=out) -> None:
            n, k, normed, gated, residual = shape
            how(x[k], weight, out[n], norm if normed else None, gated, residual)

        def layer(how, shape, many, call=call) -> None:
            for weight in many:
                call(how, shape, weight)

        def whole(how, call=call) -> None:
            for i in range(layers):
                for name, shape in LAYER.items():
                    call(how, shape, weights[name][i % sets])
            call(how, LM_HEAD, head)

        for name, shape in (*LAYER.items(), ("lm_head", LM_HEAD)):
            many = weights.get(name, [head] * 4)
            us, cublas = (replay_us(partial(layer, how, shape, many), len(many)) for how in (fused, apart))
            case = f"{name}, {tokens} tokens"
            yield result("linear", case, us, moved=many[0].nbytes, limit=limit, cublas_us=cublas)
        us, cublas = (replay_us(partial(whole, how)) for how in (fused, apart))
        moved = layers * layer_bytes + head.nbytes
        yield result("linear, a whole step", f"{tokens} tokens", us, moved=moved, limit=limit, cublas_us=cublas)
    for tokens, (name, (n, k, normed, gated, residual)) in itertools.product((256, 512, 2048, 8192), LAYER.items()):
        tokens_in = rand(tokens, k)
        rest = rand(tokens, n // 2 if gated else n), norm if normed else None, gated, residual

        def each(how, x=tokens_in, many=weights[name][:4], rest=rest) -> None:
            for weight in many:
                how(x, weight, *rest)

        us, cublas = (replay_us(partial(each, how), 4) for how in (fused, apart))
        case = f"{name}, {tokens} tokens"
        yield result("linear", case, us, flops=2 * tokens * n * k, limit=limit, cublas_us=cublas)


def line(row: dict) -> str:
    """One row of the table."""
    speed = f"{row['tflop_s']:7.0f} TFLOP/s" if "tflop_s" in row else f"{row['gb_s']:7.0f} GB/s   "
    dense = f"   sdpa {row['sdpa_us']:9.1f} us" if row.get("sdpa_us") else ""
    dense += f"   cuBLAS and others {row['cublas_us']:9.1f} us" if row.get("cublas_us") else ""
    return f"{row['kernel']:30s} {row['case']:24s} {row['us']:9.1f} us {speed} {row['share'] * 100:6.1f} %{dense}"


PARTS: dict[str, Callable[[dict], Iterator[dict]]] = {
    "decode": decode, "prefill": prefill, "elementwise": elementwise, "sampling": sampling, "linear": linear,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every benchmark, prints the table, and writes JSON where asked. `argv`: by default the command line's."""
    parser = argparse.ArgumentParser(prog="python -m hf_paged_kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures, with GPU and versions, to this file")
    parser.add_argument("--only", choices=PARTS, help="one of the benchmarks alone")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU")
    torch.manual_seed(0)
    limit = limits()
    print(f"limits: {limit['copy_gb_s']:.0f} GB/s, {limit['matmul_tflop_s']:.0f} TFLOP/s")
    rows = []
    for name in [arguments.only] if arguments.only else PARTS:
        for row in PARTS[name](limit):
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        about = {
            "command": f"python -m hf_paged_kernels.bench --json {arguments.json.name}",
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**about, "limits": limit, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
