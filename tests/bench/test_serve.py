"""`hf-paged bench serve` against a server that answers as it is told to."""

from __future__ import annotations

import asyncio
import io
import json
import math
import threading
import time

import numpy
import pytest
from rich.console import Console

pytest.importorskip("aiohttp")
from aiohttp import web

from hf_paged import cli
from hf_paged.bench import serve
from hf_paged.bench.load import arrivals, figures, plot
from hf_paged.bench.load.client import Timed
from hf_paged.errors import ConfigError

KEY = "test-key"


class FakeServer:
    """Streams `max_tokens` texts, `gap` seconds apart; prompts that begin with a token of `faults` go wrong."""

    def __init__(self, gap=0.0, first=0.0):
        self.gap, self.first = gap, first
        self.faults = {}
        self.bodies, self.inside, self.most = [], 0, 0
        self.url = ""

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self):
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _models(self, request):
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        return web.json_response({"data": [{"id": "tiny"}]})

    async def _completions(self, request):
        body = await request.json()
        self.bodies.append(body)
        fault = self.faults.get(body["prompt"][0])
        if fault == "refuse":
            return web.json_response({"error": {"message": "full"}}, status=429)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            return await self._stream(request, body, fault)
        finally:
            self.inside -= 1

    async def _stream(self, request, body, fault):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.first)
        for index in range(body["max_tokens"]):
            if index:
                await asyncio.sleep(self.gap)
            if fault == "break" and index == 1:
                await response.write(b'data: {"error": {"message": "engine died"}}\n\n')
                break
            event = {"choices": [{"text": "x", "index": 0}], "usage": None}
            data = f"data: {json.dumps(event)}\n\n".encode()
            await response.write(data[:9])  # events don't come in one piece
            await response.write(data[9:])
        if fault == "hang up":
            return response
        usage = {
            "choices": [],
            "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]},
        }
        await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        return response


def bench(capsys, server, *arguments, status=0):
    """The JSON that the command prints last."""
    capsys.readouterr()
    base = ["--url", server.url, "--api-key", KEY, "--warmup", "0", "--timeout", "60"]
    command = ["bench", "serve", *base, *map(str, arguments)]
    assert cli.main(command) == status
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# -------------------------------------------------------------------------------------------------------- what is sent


def test_bodies_are_what_was_asked_for(capsys):
    with FakeServer() as server:
        found = bench(capsys, server, "--requests", 6, "--prompt-len", "3-5", "--output-len", 4, "--vocab-size", 50)
        assert len(server.bodies) == 6
        for body in server.bodies:
            assert 3 <= len(body["prompt"]) <= 5
            assert max(body["prompt"]) < 50
            assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("tiny", 4, True, True)
        assert (found["requests"], found["completed"], found["errors"]) == (6, 6, {})
        assert (found["workload"], found["load"]) == ("random 3-5/4", {"loop": "open", "rate": None})
        assert found["output_tokens"] == 24
        again = len(server.bodies)
        bench(capsys, server, "--requests", 2, "--prompt-len", 3, "--output-len", 4, "--stop-at-eos", "--warmup", 1)
        assert "ignore_eos" not in server.bodies[again]
        assert server.bodies[again]["prompt"] == server.bodies[again + 1]["prompt"][::-1]  # the warm-up


def test_workloads_are_those_of_the_throughput_benchmark(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt_token_ids": [5, 6], "max_tokens": 2}\n{"prompt_token_ids": [7], "max_tokens": 3}\n')
    with FakeServer() as server:
        assert bench(capsys, server, "--workload", file)["output_tokens"] == 5
        found = bench(capsys, server, "--workload", "A", "--requests", 3)
        assert (found["requests"], found["prompt_tokens"]) == (3, sum(len(b["prompt"]) for b in server.bodies[-3:]))
        assert found["output_tokens"] == sum(body["max_tokens"] for body in server.bodies[-3:])


# -------------------------------------------------------------------------------------------------------------- timing


def test_closed_loop_keeps_so_many_at_a_time(capsys):
    with FakeServer(gap=0.01) as server:
        found = bench(capsys, server, "--requests", 20, "--concurrency", 4, "--prompt-len", 2, "--output-len", 3)
        assert server.most == 4
        assert found["load"] == {"loop": "closed", "concurrency": 4}


def test_times_are_those_of_the_server(capsys):
    with FakeServer(gap=0.05, first=0.2) as server:
        found = bench(capsys, server, "--requests", 5, "--prompt-len", 2, "--output-len", 5)
        # What the server waits is counted where it belongs; a busy machine adds to each.
        first, token, whole = found["ttft"]["p50"], found["tpot"]["mean"], found["e2e"]["p50"]
        assert first >= 0.2
        assert min(token, found["inter_token"]["p50"]) >= 0.045
        assert whole >= first + 4 * 0.045
        assert whole == pytest.approx(first + 4 * token, rel=0.5)


def test_open_loop_sends_whatever_the_server_does(capsys):
    with FakeServer(first=1.0) as server:
        found = bench(capsys, server, "--requests", 30, "--rate", 100, "--prompt-len", 2, "--output-len", 1)
        assert server.most > 10  # they don't wait for each other
        assert 0 <= found["client"]["most_late"] <= found["seconds"]  # how late it is depends on the machine


def test_arrivals_are_a_poisson_process():
    gaps = arrivals._gaps(10.0, seed=1)
    values = [next(gaps) for _ in range(4000)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    assert mean == pytest.approx(0.1, rel=0.06)
    assert deviation == pytest.approx(mean, rel=0.06)
    assert [next(arrivals._gaps(10.0, seed=1)) for _ in range(2)] == values[:1] * 2


def test_latency_counts_from_when_a_request_was_due():
    timed = Timed(start=1.0, prompt_tokens=1, sent=3.0, first=4.0, last=6.0, output_tokens=3, end=6.5)
    assert (timed.ttft, timed.per_token, timed.latency) == (3.0, 1.0, 5.5)


# ------------------------------------------------------------------------------------------------- errors, and goodput


def test_errors_are_counted_by_what_they_say(tmp_path, capsys):
    lines = [{"prompt_token_ids": [first], "max_tokens": 3} for first in (1, 1, 2, 3, 4)]
    file = tmp_path / "faulty.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with FakeServer() as server:
        server.faults = {2: "refuse", 3: "break", 4: "hang up"}
        found = bench(capsys, server, "--workload", file)
    assert found["completed"] == 2
    refused, broken, cut = sorted(found["errors"], key=lambda text: ("429" not in text, "died" not in text))
    assert "full" in refused
    assert "engine died" in broken
    assert cut == "the stream ended without [DONE]"
    assert found["goodput"]["share"] == 0.4


def test_no_request_served_is_exit_status_1(tmp_path, capsys):
    file = tmp_path / "faulty.jsonl"
    file.write_text('{"prompt_token_ids": [2], "max_tokens": 3}')
    with FakeServer() as server:
        server.faults = {2: "refuse"}
        found = bench(capsys, server, "--workload", file, status=1)
    assert (found["completed"], found["ttft"]) == (0, None)


def test_a_request_that_takes_too_long_is_a_timeout(capsys):
    with FakeServer(first=1.5) as server:
        arguments = ("--requests", 1, "--prompt-len", 2, "--output-len", 2, "--timeout", 0.3)
        assert bench(capsys, server, *arguments, status=1)["errors"] == {"timeout": 1}


def test_goodput_counts_those_that_keep_to_the_objective(capsys):
    objective = figures.Objective.parse("ttft=0.5,tpot=0.1,e2e=2")
    fast = Timed(0.0, 1, first=0.4, last=1.3, output_tokens=10, end=1.4)
    slow = Timed(0.0, 1, first=0.6, last=1.3, output_tokens=10, end=1.4)
    long = Timed(0.0, 1, first=0.4, last=1.3, output_tokens=10, end=2.1)
    jerky = Timed(0.0, 1, first=0.4, last=1.5, output_tokens=10, end=1.6)
    failed = Timed(0.0, 1, first=0.4, last=1.3, output_tokens=10, end=1.4, error="no")
    assert [objective.kept(timed) for timed in (fast, slow, long, jerky, failed)] == [True, False, False, False, False]
    with FakeServer(first=0.1) as server:
        found = bench(capsys, server, "--requests", 4, "--prompt-len", 2, "--output-len", 2, "--slo", "ttft=0.01")
        assert found["goodput"] == {"requests_per_second": 0.0, "share": 0.0}
        assert found["slo"] == {"ttft": 0.01, "tpot": None, "e2e": None}


@pytest.mark.parametrize("text", ["ttft", "ttft=x", "speed=1", "ttft=-1"])
def test_an_objective_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="--slo takes NAME=SECONDS for ttft, tpot, e2e"):
        figures.Objective.parse(text)


def test_percentiles():
    assert figures.spread([]) is None
    found = figures.spread([float(value) for value in range(101)])
    assert (found["p50"], found["p90"], found["p99"], found["max"], found["mean"]) == (50.0, 90.0, 99.0, 100.0, 50.0)
    assert figures.percentile([1.0, 2.0], 0.5) == 1.5


# ----------------------------------------------------------------------------------------------------- what it refuses


def test_other_machines_are_not_loaded_unless_asked(capsys):
    assert cli.main(["bench", "serve", "--url", "http://192.0.2.1:8000", "--requests", "1"]) == 2
    assert "192.0.2.1" in (message := capsys.readouterr().err)
    assert "--allow-remote" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "ftp://127.0.0.1"], "--url must be like"),
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["--url", "http://127.0.0.1:9", "--workload", "nowhere"], "neither A, cpu nor a file"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, words):
    assert cli.main(["bench", "serve", "--requests", "1", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_key_is_told_as_the_server_says_it(capsys):
    with FakeServer() as server:
        assert cli.main(["bench", "serve", "--url", server.url, "--requests", "1"]) == 2
    assert "answers 401" in capsys.readouterr().err


def test_the_key_is_not_published(monkeypatch, capsys):
    for arguments in (["--api-key", KEY], [f"--api-key={KEY}"]):
        monkeypatch.setattr("sys.argv", ["hf-paged", "bench", "serve", *arguments, "--requests", "1"])
        with FakeServer() as server:
            found = bench(capsys, server, "--requests", 1, "--prompt-len", 2, "--output-len", 2)
        assert KEY not in json.dumps(found)
        assert found["environment"]["command"].endswith("--requests 1")


@pytest.mark.parametrize("option", [["--rate", "0"], ["--rate", "1", "--concurrency", "2"], ["--prompt-len", "5-2"]])
def test_arguments_out_of_range(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "serve", *option])


def test_without_its_library_it_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert cli.main(["bench", "serve", "--requests", "1"]) == 2
    assert "pip install '.[bench]'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- pictures, and the price


def test_the_plot_and_the_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with FakeServer(gap=0.002) as server:
        arguments = ("--requests", 10, "--rate", 50, "--prompt-len", 2, "--output-len", 5, "--slo", "ttft=0.1")
        files = ("--plot", tmp_path / "run.png", "--json", tmp_path / "run.json")
        found = bench(capsys, server, *arguments, *files)
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "run.json").read_text()) == found


SPREADS = {
    "few": [0.1, 0.2, 0.409],
    "one": [0.25],
    "a long tail": [0.001 * number for number in range(98)] + [3.0, 4.0],
    "an even number": [0.4, 0.5, 0.6, 1.7],
    "below a millisecond": [0.0001, 0.00012, 0.0009],
    "seconds": [1.2345, 12.3456, 123.4567],
}


@pytest.mark.parametrize("kind", SPREADS)
def test_the_plot_tells_the_percentiles_of_the_table_and_the_file(kind, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    told = []
    monkeypatch.setattr(axes.Axes, "annotate", lambda self, text, at, **options: told.append((text, at)))
    curves = []
    monkeypatch.setattr(axes.Axes, "plot", lambda self, x, y, *marks, **options: curves.append((x, y, marks)))
    requests = []
    for value in SPREADS[kind]:
        timed = Timed(1.0, 1, first=1.0 + value, last=1.0 + 2 * value, output_tokens=2, end=1.0 + 3 * value)
        timed.gaps.append(value)
        requests.append(timed)
    summary = figures.summarise(requests, figures.Objective()) | {"workload": "w", "load": {"loop": "open", "rate": 1}}
    summary["client"] = {"cpu_share": 0.0}
    plot.draw(requests, summary, tmp_path / "run.png")
    console = Console(file=io.StringIO(), width=200)
    serve.show(summary, console)
    table = console.file.getvalue()
    names = [(key, name) for key in ("ttft", "inter_token", "e2e") for name in ("p50", "p99")]
    assert len(told) == len(names)
    for (text, at), (key, name) in zip(told, names, strict=True):
        value = summary[key][name]
        assert text == f"{name} {1000 * value:,.1f} ms"
        assert f" {1000 * value:,.1f} " in table
        assert at == (1000 * value, figures.SHARES[name])
    # The marks lie on their curves.
    for number in range(0, 9, 3):
        (x, y, _), *marks = curves[number : number + 3]
        for at, share, _ in marks if len(x) > 1 else ():
            assert numpy.interp(at, x, y) == pytest.approx(share, abs=0.01)


def test_250_streams_cost_the_client_little(capsys):
    with FakeServer(gap=0.1) as server:
        began = time.process_time()
        found = bench(capsys, server, "--requests", 250, "--prompt-len", 2, "--output-len", 10)
        used = time.process_time() - began
    assert found["completed"] == 250
    # Of client and fake server together; a client that parsed every event with httpx would take ten times that.
    assert used / found["output_tokens"] < 0.002
