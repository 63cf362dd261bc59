"""The bundled plugins in a real server: what they tell of requests that were really served."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time

import httpx
import jsonschema
import pytest

from hf_paged import cli

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def complete(server, **body):
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "temperature": 0, **body}
    return httpx.post(server.url + "/v1/completions", json=body, timeout=60)


def sample(server, name):
    """The sum of a metric's samples."""
    text = httpx.get(server.url + "/metrics", timeout=60).text
    return sum(float(value) for value in re.findall(rf"^hf_paged:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def until(check, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def test_metrics_count_what_was_served(tiny_server):
    names = ("generation_tokens_total", "prompt_tokens_total", "request_success_total")
    names += ("time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "iteration_tokens_total_sum")
    before = {name: sample(tiny_server, name) for name in names}
    usage = complete(tiny_server, ignore_eos=True).json()["usage"]
    until(lambda: sample(tiny_server, "iteration_tokens_total_sum") > before["iteration_tokens_total_sum"])
    grown = {name: sample(tiny_server, name) - before[name] for name in names}
    assert grown["generation_tokens_total"] == usage["completion_tokens"] == 8
    assert grown["prompt_tokens_total"] == usage["prompt_tokens"]
    assert (grown["request_success_total"], grown["time_to_first_token_seconds_count"]) == (1, 1)
    assert grown["inter_token_latency_seconds_count"] == 7


def test_the_page_shows_a_request_and_its_blocks(tiny_server):
    page = httpx.get(tiny_server.url + "/", timeout=60)
    assert page.status_code == 200
    assert "<title>hf_paged</title>" in page.text
    body = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}
    thread = threading.Thread(target=complete, args=(tiny_server,), kwargs=body)
    thread.start()

    def seen():
        state = httpx.get(tiny_server.url + "/dashboard/state", timeout=60).json()
        running = [one["id"] for one in state["requests"] if one["state"] == "running"]
        (group,) = state["engines"][0]["groups"]
        return [group["blocks"].get(name) for name in running if group["blocks"]]

    stretches = until(lambda: [found for found in seen() if found])
    assert all(first >= 1 and length >= 1 for first, length in stretches[0])
    thread.join(60)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{4}"}}, "[a-c]{4}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}, None),
    ],
)
def test_structured_outputs(tiny_server, form, pattern):
    answer = complete(tiny_server, max_tokens=300, temperature=1.0, seed=1, **form).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    if pattern:
        assert re.fullmatch(pattern, choice["text"])
    else:
        jsonschema.validate(json.loads(choice["text"]), PERSON)


def test_what_a_schema_asks_too_much_is_a_400_that_names_it(tiny_server):
    answer = complete(tiny_server, structured_outputs={"json": {"type": "array", "uniqueItems": True}})
    assert answer.status_code == 400
    assert "uniqueItems" in answer.json()["error"]["message"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "constraint", [{"json": {"type": "array", "uniqueItems": True}}, {"regex": "("}, {"grammar": "root ::= nothing"}]
)
def test_what_cannot_be_compiled_never_ran(tiny_server, constraint, n):
    """A 400 is a refusal, one for the call, and none of its sequences counts as finished."""
    names = ("request_success_total", "request_refused_total", "e2e_request_latency_seconds_count")
    before = [sample(tiny_server, name) for name in names]
    assert complete(tiny_server, structured_outputs=constraint, n=n, temperature=1).status_code == 400
    assert [sample(tiny_server, name) for name in names] == [before[0], before[1] + 1, before[2]]
    assert re.search(
        r'request_refused_total{.*reason="invalid".*} ', httpx.get(tiny_server.url + "/metrics", timeout=60).text
    )
    assert complete(tiny_server).status_code == 200
    assert sample(tiny_server, names[0]) == before[0] + 1


def test_structured_outputs_go_on_where_they_were_when_the_engine_is_killed(serve):
    server = serve("--no-spare-engine").wait_ready()
    wanted = {"structured_outputs": {"regex": "([a-d]{3},){60}"}, "max_tokens": 400}
    undisturbed = complete(server, **wanted).json()["choices"][0]
    assert undisturbed["finish_reason"] == "stop"
    for kills in range(1, 11):  # on a busy machine the answer may be complete before the kill comes
        until(lambda kills=kills: len(server.engine_pids) == kills)
        assert killed_at_its_first_token(server, wanted) == undisturbed["text"]
        if "1 requests will be resumed" in server.text:
            break
    else:
        pytest.fail("no kill came in time")
    assert sample(server, "engine_restarts_total") == kills
    assert server.stop() == 0


def killed_at_its_first_token(server, wanted):
    """The text of a stream whose engine is killed when its first token comes."""
    body = {"model": "tiny", "prompt": "Once", "temperature": 0, "stream": True, **wanted}
    text = []
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                if not text:
                    os.kill(server.engine_pids[-1], signal.SIGKILL)
                text.append(json.loads(line[6:])["choices"][0]["text"])
    return "".join(text)


def test_bench_serve_measures_this_server(tiny_server, capsys):
    arguments = [
        "--requests",
        "12",
        "--concurrency",
        "4",
        "--prompt-len",
        "5-20",
        "--output-len",
        "10",
        "--warmup",
        "1",
    ]
    before = sample(tiny_server, "generation_tokens_total")
    assert cli.main(["bench", "serve", "--url", tiny_server.url, "--vocab-size", "200", *arguments]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["completed"], found["output_tokens"], found["model"]) == (12, 120, "tiny")
    assert found["ttft"]["p50"] > 0
    assert sample(tiny_server, "generation_tokens_total") - before == 128  # with the warm-up's


def test_routes_of_plugins_are_behind_the_key(serve):
    server = serve("--api-key", "sesame", "--no-spare-engine", env={"HF_PAGED_TRACES": "console"}).wait_ready()
    for path in ("/", "/metrics", "/dashboard/state"):
        page = {"Accept": "text/html"}
        refused = httpx.get(server.url + path, headers=page, timeout=60)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        assert httpx.get(server.url + path, timeout=60).headers["www-authenticate"] == "Bearer"
        assert httpx.get(server.url + path, auth=("any", "sesame"), timeout=60).status_code == 200
        assert httpx.get(server.url + path, auth=("sesame", "other"), timeout=60).status_code == 401
        other_site = {"Sec-Fetch-Site": "cross-site"}
        assert httpx.get(server.url + path, auth=("any", "sesame"), headers=other_site, timeout=60).status_code == 401
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 3}
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    httpx.post(server.url + "/v1/completions", json=body, headers=parent, auth=("any", "sesame"), timeout=60)
    assert server.stop() == 0
    assert '"name": "llm_request tiny"' in server.text  # spans were sent before the end
    assert '"parent_id": "0xb7ad6b7169203331"' in server.text
