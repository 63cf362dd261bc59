"""/metrics: vLLM's names and meanings, counted from what the server tells."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

import hf_paged_metrics
from hf_paged_metrics.metrics import sample_names
from traffic import Traffic

# As people know them; counters are served with _total behind.
GAUGES = "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info"
COUNTERS = """prefix_cache_queries prefix_cache_hits num_preemptions prompt_tokens prompt_tokens_cached
    generation_tokens request_success"""
HISTOGRAMS = """request_prompt_tokens request_generation_tokens iteration_tokens_total request_params_n
    request_params_max_tokens time_to_first_token_seconds inter_token_latency_seconds
    request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds
    request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds"""


@pytest.fixture
def traffic():
    return Traffic(hf_paged_metrics)


def scrape(traffic, **headers):
    """Samples by name without the prefix; the value of the only one, or a dict by the labels beside the usual ones."""
    response = traffic.client.get("/metrics", headers=headers)
    assert response.status_code == 200
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            name = sample.name.removeprefix("hf_paged:")
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found.setdefault(name, {})[tuple(labels.values())] = sample.value
    return {name: values[()] if set(values) == {()} else values for name, values in found.items()}


def test_every_name_people_know_is_there():
    names = sample_names()
    for name in GAUGES.split():
        assert f"hf_paged:{name}" in names
    for name in COUNTERS.split():
        assert f"hf_paged:{name}_total" in names
    for name in HISTOGRAMS.split():
        assert {f"hf_paged:{name}_{part}" for part in ("bucket", "sum", "count")} <= names


def test_everything_but_events_is_served_before_anything_happened(traffic):
    found = scrape(traffic)
    assert found["num_requests_waiting"] == found["generation_tokens_total"] == 0
    assert found["time_to_first_token_seconds_count"] == 0
    text = traffic.client.get("/metrics").text
    assert 'hf_paged:num_requests_running{engine="0",model_name="tiny"} 0.0' in text


def test_a_request_from_its_start_to_its_end(traffic):
    record = traffic.start("a", n=3)
    traffic.report(waiting=["a"])
    assert scrape(traffic)["num_requests_waiting"] == 1
    assert scrape(traffic)["prompt_tokens_total"] == 0  # not before its prompt was computed
    traffic.bring(record, 1, cached=4)
    traffic.report(running=["a"], steps=[(10, 0, 0.1), (0, 1, 0.1)])
    found = scrape(traffic)
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (1, 0)
    assert (found["prompt_tokens_total"], found["prompt_tokens_cached_total"]) == (10, 4)
    assert found["time_to_first_token_seconds_count"] == 1
    assert found["inter_token_latency_seconds_count"] == 0
    assert (found["iteration_tokens_total_count"], found["iteration_tokens_total_sum"]) == (2, 11)
    traffic.bring(record, 1)
    traffic.bring(record, 3)
    traffic.end(record)
    traffic.report()
    found = scrape(traffic)
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (0, 0)
    assert found["generation_tokens_total"] == 5
    assert found["inter_token_latency_seconds_count"] == 4  # one for each token after the first
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(record.last_token - record.first_token)
    assert found["request_success_total"] == {("stop",): 1}
    sums = {name: found[f"{name}_sum"] for name in HISTOGRAMS.split()}
    assert sums["request_queue_time_seconds"] == pytest.approx(0.1)
    assert sums["request_prefill_time_seconds"] == pytest.approx(0.2)
    assert sums["request_decode_time_seconds"] == pytest.approx(0.4)
    assert sums["request_inference_time_seconds"] == pytest.approx(0.6)
    assert sums["request_time_per_output_token_seconds"] == pytest.approx(0.1)  # 0.4 over the four after the first
    assert (sums["request_prompt_tokens"], sums["request_generation_tokens"]) == (10, 5)
    assert (sums["request_params_n"], sums["request_params_max_tokens"]) == (3, 5)
    assert sums["e2e_request_latency_seconds"] == pytest.approx(record.latency)


def test_a_call_with_several_completions_tells_its_n_once(traffic):
    for index in range(2):
        traffic.end(traffic.start(f"c{index}", index=index, n=2))
    assert scrape(traffic)["request_params_n_count"] == 1


def test_ends_and_refusals_are_counted_by_why(traffic):
    for name, reason in enumerate(("stop", "length", "length", "abort", "queue_timeout")):
        record = traffic.start(str(name))
        traffic.stats.ended(record, reason)
    for reason in ("queue_full", "queue_full", "draining"):
        traffic.stats.refused(reason)
    found = scrape(traffic)
    ends = {("stop",): 1, ("length",): 2, ("abort",): 1, ("queue_timeout",): 1}
    assert found["request_success_total"] == ends
    assert found["request_refused_total"] == {("queue_full",): 2, ("draining",): 1}
    assert found["request_queue_time_seconds_count"] == 0  # the engine told no times of theirs


def test_what_the_engine_refused_is_none_of_those_that_finished(traffic):
    record = traffic.start("a")
    traffic.report()
    assert scrape(traffic)["num_requests_waiting"] == 1
    traffic.end(record, "refused", error="no such grammar", error_kind="invalid")
    traffic.stats.refused("invalid")
    traffic.end(traffic.start("b"), "error")
    traffic.report()
    found = scrape(traffic)
    assert found["request_success_total"] == {("error",): 1}
    assert found["request_refused_total"] == {("invalid",): 1}
    assert found["e2e_request_latency_seconds_count"] == found["request_params_n_count"] == 1
    assert found["num_requests_waiting"] == 0


def test_counters_go_on_when_an_engine_begins_anew(traffic):
    traffic.report(prefix_queries=100, prefix_hits=40, preemptions=2, num_steps=9, running=["a"])
    traffic.report(prefix_queries=150, prefix_hits=60, preemptions=3, num_steps=12)
    traffic.stats.restarted(0, "it was killed")
    assert scrape(traffic)["num_requests_running"] == 0
    traffic.report(prefix_queries=10, prefix_hits=0, preemptions=1, num_steps=1)
    found = scrape(traffic)
    assert (found["prefix_cache_queries_total"], found["prefix_cache_hits_total"]) == (160, 60)
    assert (found["num_preemptions_total"], found["engine_restarts_total"]) == (4, 1)


def test_replicas_are_told_apart(traffic):
    traffic.report(replica=0, running=["a", "b"], kv_usage=0.5)
    traffic.report(replica=1, running=["c"], kv_usage=0.75)
    text = traffic.client.get("/metrics").text
    assert re.search(r'num_requests_running\{engine="0",.*\} 2.0', text)
    assert re.search(r'num_requests_running\{engine="1",.*\} 1.0', text)
    assert re.search(r'kv_cache_usage_perc\{engine="1",.*\} 0.75', text)


def test_the_cache_is_told_as_it_is_now(traffic):
    traffic.report(num_blocks=100)
    traffic.report(num_blocks=200)
    (labels,) = re.findall(r"cache_config_info\{(.*)\} 1.0", traffic.client.get("/metrics").text)
    assert 'num_gpu_blocks="200"' in labels
    assert 'block_size="16"' in labels
    assert 'enable_prefix_caching="True"' in labels


def test_both_formats(traffic):
    assert traffic.client.get("/metrics").headers["content-type"].startswith("text/plain; version=")
    wanted = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = traffic.client.get("/metrics", headers=wanted)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


@pytest.mark.parametrize("version", ["[[[[;q=1e400", "1.0.0;q=nan", "9" * 5000, "\u0663.\u0660", "-1"])
def test_an_accept_header_that_can_not_be_read(traffic, version):
    response = traffic.client.get(
        "/metrics", headers={"accept": f"application/openmetrics-text;version={version}".encode()}
    )
    assert response.status_code == 200


def test_processes_that_share_a_directory_are_counted_together(tmp_path):
    code = textwrap.dedent("""
        import sys
        import hf_paged_metrics
        from traffic import Traffic

        traffic = Traffic(hf_paged_metrics)
        for index in range(int(sys.argv[1])):
            record = traffic.start(str(index))
            traffic.bring(record, 2)
            traffic.end(record)
        print(traffic.client.get("/metrics").text)
    """)
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(count):
        command = [sys.executable, "-c", code, str(count)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout

    run(2)
    text = run(3)
    assert re.search(r"hf_paged:generation_tokens_total\{.*\} 10.0", text)
    assert re.search(r"hf_paged:time_to_first_token_seconds_count\{.*\} 5.0", text)


def test_without_the_library_it_says_which_extra(monkeypatch):
    monkeypatch.setattr(hf_paged_metrics, "find_spec", lambda name: None)
    response = Traffic(hf_paged_metrics).client.get("/metrics")
    assert response.status_code == 501
    assert "pip install '.[server]'" in response.text


def test_counting_a_token_is_cheap(traffic):
    import time

    record = traffic.start("a")
    traffic.bring(record, 1)
    began = time.process_time()
    for _ in range(2000):
        traffic.bring(record, 1)
    assert (time.process_time() - began) / 2000 < 100e-6  # some 5 µs; 7,000 tokens a second must not fill a core
